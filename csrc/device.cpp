#include "device.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace fedrot::device {
namespace {

static_assert(sizeof(LayerRow) == 13 * sizeof(Integer));
static_assert(sizeof(ClientRow) == 6 * sizeof(Integer));
static_assert(sizeof(Unit) == 5 * sizeof(Integer));
constexpr Integer layer_integers = sizeof(LayerRow) / sizeof(Integer);
constexpr Integer client_integers = sizeof(ClientRow) / sizeof(Integer);
constexpr Integer unit_integers = sizeof(Unit) / sizeof(Integer);

// Enough units for several on each of the 100 to 150 multiprocessors of a large card.
constexpr Integer wanted_units = 1024;

// A power of two of at least `smallest` positions, more where there are enough for all units.
Integer chunk(Integer positions, Integer smallest) {
  constexpr Integer largest = 8192;
  Integer size = 1;
  while (size < smallest || (size < largest && size * wanted_units < positions)) size *= 2;
  return size;
}

void cut(std::vector<Unit>& units, Integer layer, Side side, Integer positions, Integer size) {
  for (Integer begin = 0; begin < positions; begin += size)
    units.push_back({layer, side, begin, std::min(begin + size, positions), 0});
}

template <class Row>
Integer* append(Integer* to, const Row& row) {
  std::memcpy(to, &row, sizeof row);
  return to + sizeof row / sizeof(Integer);
}

Address address(const void* pointer) { return Address(reinterpret_cast<std::uintptr_t>(pointer)); }

}  // namespace

Call::Call(const Tables& tables, Align align, bool aggregate, Integer cache_bytes) {
  const Integer layers = Integer(tables.shapes.size()), clients = Integer(tables.clients());
  Integer output_positions = 0, largest_rank = 1;
  for (const Layer& shape : tables.shapes) {
    output_positions += shape.d + shape.k;
    largest_rank = std::max<Integer>(largest_rank, shape.r);
  }
  // A partial is r * r elements written and read again, beside chunk * r that are read for it.
  const Integer covariance_chunk =
      chunk(output_positions * clients, std::max<Integer>(256, 32 * largest_rank));
  const Integer apply_chunk = std::min<Integer>(chunk(output_positions, 32), 256);

  Launch launch{};
  Integer group_bytes = 0;
  const auto close_group = [&] {
    launch.covariance_end = Integer(covariance_units.size());
    launches.push_back(launch);
    launch = {launch.covariance_end, launch.covariance_end, launch.apply_end,
              Integer(apply_units.size())};
    group_bytes = 0;
  };
  const Integer width = tables.client_dtype == DType::f64   ? 8
                        : tables.client_dtype == DType::f32 ? 4
                                                            : 2;
  for (Integer l = 0; l < layers; ++l) {
    const Layer& shape = tables.shapes[l];
    const Integer r = shape.r, bytes = (shape.d + shape.k) * r * clients * width;
    if (aggregate && group_bytes > 0 && group_bytes + bytes > cache_bytes) close_group();
    group_bytes += bytes;
    const std::size_t first = covariance_units.size();
    if (align != Align::B) cut(covariance_units, l, columns_of_A, shape.k, covariance_chunk);
    if (align != Align::A) cut(covariance_units, l, rows_of_B, shape.d, covariance_chunk);
    for (std::size_t u = first; u < covariance_units.size(); ++u) {
      covariance_units[u].slot = partials;
      partials += clients * r * r;
    }
    first_unit_.push_back(Integer(first));
    units_.push_back(Integer(covariance_units.size() - first));
    if (aggregate) {
      cut(apply_units, l, columns_of_A, shape.k, apply_chunk);
      cut(apply_units, l, rows_of_B, shape.d, apply_chunk);
    }
  }
  close_group();
  if (aggregate) close_group();  // the apply of the last group

  for (Integer i = 0; i < clients * layers; ++i)
    rotations += Integer(tables.ranks[i]) * tables.shapes[i % layers].r;
  sections.bases = 0;
  sections.layers = clients;
  sections.clients = sections.layers + layers * layer_integers;
  sections.covariance_units = sections.clients + clients * layers * client_integers;
  sections.apply_units =
      sections.covariance_units + Integer(covariance_units.size()) * unit_integers;
  sections.size = sections.apply_units + Integer(apply_units.size()) * unit_integers;
}

void Call::pack(const Tables& tables, const std::vector<Address>& bases,
                const std::vector<Address>& R, const std::vector<Matrix>& out_A,
                const std::vector<Matrix>& out_B, Integer* out) const {
  const std::size_t layers = tables.shapes.size(), tensors = tables.ranks.size();
  const std::size_t outputs = apply_units.empty() ? 0 : layers;
  if (first_unit_.size() != layers || bases.size() != tables.clients() || R.size() != tensors ||
      out_A.size() != outputs || out_B.size() != outputs)
    throw std::invalid_argument("tables of different length");
  for (const Address base : bases) out = append(out, base);
  for (std::size_t l = 0; l < layers; ++l) {
    const Matrix A = outputs ? out_A[l] : Matrix{}, B = outputs ? out_B[l] : Matrix{};
    const Layer& shape = tables.shapes[l];
    out = append(out, LayerRow{shape.d, shape.k, shape.r, address(tables.ref_A[l].data),
                               tables.ref_A[l].row_stride, address(tables.ref_B[l].data),
                               tables.ref_B[l].row_stride, address(A.data), A.row_stride,
                               address(B.data), B.row_stride, first_unit_[l], units_[l]});
  }
  for (std::size_t i = 0; i < tensors; ++i) {
    const Address base = bases[i / layers];
    out = append(out, ClientRow{address(tables.lora_A[i].data) - base, tables.lora_A[i].row_stride,
                                address(tables.lora_B[i].data) - base, tables.lora_B[i].row_stride,
                                tables.ranks[i], R[i]});
  }
  for (const Unit& unit : covariance_units) out = append(out, unit);
  for (const Unit& unit : apply_units) out = append(out, unit);
}

std::vector<Address> rotations_in(Address buffer, Integer width, const Tables& tables) {
  std::vector<Address> addresses(tables.ranks.size());
  for (std::size_t i = 0; i < addresses.size(); ++i) {
    addresses[i] = buffer;
    buffer += width * tables.ranks[i] * tables.shapes[i % tables.shapes.size()].r;
  }
  return addresses;
}

}  // namespace fedrot::device
