#include "tables.h"

#include <cstring>
#include <limits>
#include <stdexcept>

namespace fedrot {
namespace {

struct Device {
  std::int32_t type, id;
  bool operator==(const Device& other) const { return type == other.type && id == other.id; }
};

struct View {
  Matrix matrix;
  std::int64_t rows, columns;
  DType dtype;
  Device device;
};

std::optional<DType> dtype_of(const dlpack::Tensor& t) {
  if (t.lanes != 1) return {};
  if (t.code == dlpack::float_code) {
    if (t.bits == 64) return DType::f64;
    if (t.bits == 32) return DType::f32;
    if (t.bits == 16) return DType::f16;
  }
  if (t.code == dlpack::bfloat_code && t.bits == 16) return DType::bf16;
  return {};
}

// A non-empty matrix whose rows are contiguous.
std::optional<View> view(dlpack::Show show, void* object) {
  dlpack::Tensor t{};
  if (show(object, &t) != 0) return {};
  const std::optional<DType> dtype = dtype_of(t);
  if (!dtype || t.ndim != 2 || !t.data || !t.strides) return {};
  const std::int64_t rows = t.shape[0], columns = t.shape[1];
  if (rows < 1 || columns < 1 || (columns > 1 && t.strides[1] != 1)) return {};
  void* data = static_cast<char*>(t.data) + t.byte_offset;
  return View{{data, t.strides[0]}, rows, columns, *dtype, {t.device_type, t.device_id}};
}

// Of thousands of tensors, each is some lines of memory that no prefetcher foresees. The first word
// of a PyTorch tensor's object is where its implementation lies, right before which its storage
// mostly does, too; were it another word, to prefetch from there would do no harm. Inlined by
// force: GCC takes a function that only prefetches for one without effect, and drops its calls.
[[gnu::always_inline]] inline void look_ahead(const std::vector<void*>& objects, std::size_t i,
                                              std::size_t head) {
  constexpr std::size_t near = 4, far = 8;
  if (i + far >= objects.size()) return;
  __builtin_prefetch(objects[i + far]);
  std::uintptr_t implementation;
  std::memcpy(&implementation, static_cast<const char*>(objects[i + near]) + head,
              sizeof implementation);
  for (int line = -2; line < 4; ++line)
    __builtin_prefetch(reinterpret_cast<const void*>(implementation + 64 * line));
}

}  // namespace

void Tables::move(const std::vector<std::int64_t>& bytes) {
  if (bytes.size() != clients()) throw std::invalid_argument("one distance per client");
  for (std::vector<Matrix>* table : {&lora_A, &lora_B})
    for (std::size_t i = 0; i < table->size(); ++i) {
      void*& data = (*table)[i].data;
      data = static_cast<char*>(data) + bytes[i / shapes.size()];
    }
}

Problem Tables::problem(const std::vector<double>& weights, double lam, Align align,
                        bool proper) const {
  if (weights.size() != clients()) throw std::invalid_argument("one weight per client");
  return {int(clients()), int(shapes.size()),
          client_dtype,   ref_dtype,
          shapes.data(),  ranks.data(),
          lora_A.data(),  lora_B.data(),
          ref_A.data(),   ref_B.data(),
          weights.data(), lam,
          align,          proper};
}

std::optional<Tables> read(dlpack::Show show, std::size_t head, const std::vector<void*>& lora_A,
                           const std::vector<void*>& lora_B, const std::vector<void*>& ref_A,
                           const std::vector<void*>& ref_B) {
  const std::size_t layers = ref_A.size(), tensors = lora_A.size();
  if (layers == 0 || tensors == 0 || tensors % layers || ref_B.size() != layers ||
      lora_B.size() != tensors)
    return {};

  Tables tables;
  Device device{};
  tables.shapes.reserve(layers);
  tables.ref_A.reserve(layers);
  tables.ref_B.reserve(layers);
  for (std::size_t l = 0; l < layers; ++l) {
    const std::optional<View> A = view(show, ref_A[l]), B = view(show, ref_B[l]);
    if (!A || !B || A->rows != B->columns || A->rows > std::numeric_limits<int>::max()) return {};
    if (l == 0) tables.ref_dtype = A->dtype, device = A->device;
    if (A->dtype != tables.ref_dtype || B->dtype != tables.ref_dtype) return {};
    if (!(A->device == device) || !(B->device == device)) return {};
    tables.shapes.push_back({B->rows, A->columns, int(A->rows)});
    tables.ref_A.push_back(A->matrix);
    tables.ref_B.push_back(B->matrix);
  }

  tables.ranks.reserve(tensors);
  tables.lora_A.reserve(tensors);
  tables.lora_B.reserve(tensors);
  for (std::size_t i = 0; i < tensors; ++i) {
    look_ahead(lora_A, i, head);
    look_ahead(lora_B, i, head);
    const std::optional<View> A = view(show, lora_A[i]), B = view(show, lora_B[i]);
    const Layer& shape = tables.shapes[i % layers];
    if (!A || !B || A->rows > shape.r || A->columns != shape.k || B->rows != shape.d ||
        B->columns != A->rows)
      return {};
    if (i == 0) tables.client_dtype = A->dtype;
    if (A->dtype != tables.client_dtype || B->dtype != tables.client_dtype) return {};
    if (!(A->device == device) || !(B->device == device)) return {};
    tables.ranks.push_back(int(A->rows));
    tables.lora_A.push_back(A->matrix);
    tables.lora_B.push_back(B->matrix);
  }
  return tables;
}

}  // namespace fedrot
