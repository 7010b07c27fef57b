// The two passes over the factors: cross-covariance, and weighted, rotated average. Factors are
// read as they lie in memory, and small ranks of narrow types widened on load. Other types than the
// accumulator's, and the reference A where the columns of M fill whole vectors, go through a panel.
#pragma once

#include "few_rows.h"
#include "panel.h"
#include "product.h"
#include "small_rank.h"

namespace fedrot {
inline namespace FEDROT_ISA {

template <class Acc>
inline bool is_small(int r) {
  return r <= small_rank<Acc>;
}

// Whether A_i A_ref^T is summed lane by lane along k, with few enough sums for the registers,
// instead of by a product with the transposed reference.
template <class Acc>
inline bool by_dots(int r) {
  return r <= (lanes<Acc> > 8 ? 8 : lanes<Acc> - 1);
}

// Positions at a time: what the inner loops read again and again stays in the first-level cache.
inline int chunk_length(int r) {
  constexpr int elements = 6144, shortest = 64, longest = 512;
  return std::min(longest, std::max(shortest, elements / r / 16 * 16));
}

// Clients whose sums stay in registers together: as many as keep what is read again and again,
// directions of all of them, in the first-level cache.
constexpr int client_group = most_terms, directions_at_once = 64;
inline int clients_at_once(int directions, int r) {
  return std::min(client_group, std::max(1, directions / r));
}

// Whether A is averaged a few rows at a time, each read to the end of a chunk, with sums that wait
// in a chunk of their own: small ranks are bound by memory, and a core's prefetcher cannot follow
// the rows of many clients. With AVX-512 only where the covariance has not brought A into the
// cache: found by timing, on Zen 3 and Zen 4.
constexpr int few_rows = 8;
template <class Acc>
inline bool by_few_rows(const Problem& problem, Side side, int r) {
  return side == Side::A && is<Acc>(problem.client_dtype) &&
         (many_registers ? r <= 2 * few_rows && !cpu::is_aligned(problem, side) : r <= few_rows);
}

// Whether loops over clients fetch in order, by timing: where clients are read as they lie, and up
// to the rank from which on columns of A are packed and arithmetic takes longer than memory.
template <class Acc>
bool fetches_in_order(const Problem& problem, int r) {
  return may_be_in_order && is<Acc>(problem.client_dtype) && r <= unpacked_rows;
}

// The reference A has contiguous directions, not positions, unless M is summed by dots.
template <class Acc>
cpu::Reference<Acc> load_reference(const Problem& problem, int layer, Acc* panels, Acc* scratch) {
  const Layer s = problem.shapes[layer];
  const Matrix &A = problem.ref_A[layer], &B = problem.ref_B[layer];
  cpu::Reference<Acc> reference{};
  if (problem.align != Align::B) {
    if (by_dots<Acc>(s.r)) {
      reference.A = block(Side::A, problem.ref_dtype, A, s.r, 0, int(s.k), panels);
    } else {
      for (std::int64_t at = 0; at < s.k; at += chunk_length(s.r)) {
        const int count = int(std::min<std::int64_t>(chunk_length(s.r), s.k - at));
        const Block<Acc> rows = block(Side::A, problem.ref_dtype, A, s.r, at, count, scratch);
        transpose(s.r, count, rows.data, rows.direction, panels + at * s.r, s.r);
      }
      reference.A = {panels, 1, s.r};
    }
  }
  if (problem.align != Align::A) {
    panels += s.r * (s.k + panel_padding);
    reference.B =
        is_small<Acc>(s.r)
            ? Block<Acc>{packed_block(problem.ref_dtype, B, s.r, s.r, 0, int(s.d), panels), 1, s.r}
            : block(Side::B, problem.ref_dtype, B, s.r, 0, int(s.d), panels);
  }
  return reference;
}

// Elements of a chunk as a panel.
inline std::int64_t chunk_elements(int r) {
  return std::int64_t(r) * (chunk_length(r) + panel_padding);
}

// Elements of scratch that load_reference(), covariance() and apply() need.
template <class Acc>
std::size_t panel_scratch(int r) {
  const std::size_t chunk = chunk_elements(r);
  const std::size_t turned = std::size_t(client_group) * r * lanes<Acc>;
  const std::size_t packed =
      std::size_t(clients_at_once(directions_at_once, r)) * r * packed_columns * lanes<Acc>;
  return (client_group + 1) * chunk + std::max({turned, packed, std::size_t(r) * r});
}

// Elements that load_reference() needs for its panels.
template <class Acc>
std::size_t reference_size(const Layer& s) {
  return s.r * (s.d + s.k + panel_padding);
}

// f(null pointer of the type that the clients' factors are loaded from). Above small ranks single
// elements are loaded, or vectors again and again: there a panel is cheaper than to widen on load.
template <class Acc, class F>
inline void with_client_type(int r, DType dtype, F f) {
  if (is_small<Acc>(r))
    with_loaded<Acc>(dtype, f);
  else
    f(static_cast<Acc*>(nullptr));
}

template <class Acc, class T>
void covariance_from(const Problem& problem, int layer, int client,
                     const cpu::Reference<Acc>& reference, Ahead& ahead, Acc* M, Acc* scratch) {
  const Layer s = problem.shapes[layer];
  const int r = s.r, index = client * problem.layers + layer, rank = problem.ranks[index];
  const bool small = is_small<Acc>(r);
  T* panel = reinterpret_cast<T*>(scratch);
  Acc* sums = scratch + chunk_elements(r);
  std::fill(M, M + r * r, Acc(0));
  if (problem.align != Align::B) {
    if (by_dots<Acc>(r)) std::fill(sums, sums + r * r * lanes<Acc>, Acc(0));
    for (std::int64_t at = 0; at < s.k; at += chunk_length(r)) {
      const int count = int(std::min<std::int64_t>(chunk_length(r), s.k - at));
      const Block<T> X =
          block(Side::A, problem.client_dtype, problem.lora_A[index], rank, at, count, panel);
      const Acc* Y = reference.A.data + at * reference.A.position;
      if (by_dots<Acc>(r)) {
        dot_rows(rank, r, count, X.data, X.direction, Y, reference.A.direction, sums, ahead);
      } else if constexpr (std::is_same_v<T, Acc>) {
        const Term<Acc> term{X.data, X.direction, 1, Y, r, count};
        product<false>(rank, r, 1, &term, Into::added, M, r, ahead);
      }
    }
    if (by_dots<Acc>(r))
      for (int e = 0; e < rank * r; ++e) M[e] = horizontal_sum<Acc>(load(sums + e * lanes<Acc>));
  }
  if (problem.align == Align::A) return;
  // Memory has not been read yet: every line of B is loaded once, as a vector, and the reference
  // is what single elements are taken of. That gives the transpose.
  Acc* transposed = sums;
  if (!small) std::fill(transposed, transposed + r * rank, Acc(0));
  for (std::int64_t at = 0; at < s.d; at += chunk_length(r)) {
    const int count = int(std::min<std::int64_t>(chunk_length(r), s.d - at));
    const Matrix& B = problem.lora_B[index];
    const Acc* Y = reference.B.data + at * reference.B.position;
    if (small) {
      const T* X = packed_block(problem.client_dtype, B, rank, r, at, count, panel);
      with_rank<Acc>(r, [&](auto R) { position_covariance<R>(count, X, Y, M, ahead); });
    } else if constexpr (std::is_same_v<T, Acc>) {
      const Block<Acc> X = block(Side::B, problem.client_dtype, B, rank, at, count, panel);
      const Term<Acc> term{Y, 1, reference.B.position, X.data, X.position, count};
      product<true>(r, rank, 1, &term, Into::added, transposed, rank, ahead);
    }
  }
  if (!small)
    for (int p = 0; p < rank; ++p)
      for (int q = 0; q < r; ++q) M[p * r + q] += transposed[q * rank + p];
}

// M (r, r) <- A_i A_ref^T + B_i^T B_ref or what `align` asks for; rows beyond the client's rank 0.
template <class Acc>
void covariance(const Problem& problem, int layer, int client, const cpu::Reference<Acc>& reference,
                Ahead& ahead, Acc* M, Acc* scratch) {
  with_client_type<Acc>(problem.shapes[layer].r, problem.client_dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    covariance_from<Acc, T>(problem, layer, client, reference, ahead, M, scratch);
  });
}

// Positions begin <= t < end of A or B in chunks of `length`: `add(at, count, C, row)` adds the
// share of a block of clients to C, rows `row` apart. The last block of clients rounds the result
// to `out`; it returns false where a value is not finite. sums: what earlier blocks left, laid out
// like the factor, with `padding` between rows of A; not used `in_place`, where `out` holds the
// sums, and may be null where one block has all clients (then own_sums, a chunk).
template <class Acc, class Add>
bool average_chunks(const Problem& problem, int layer, Side side, std::int64_t begin,
                    std::int64_t end, bool last_block, int length, bool in_place, int padding,
                    const Matrix& out, Acc* sums, Acc* own_sums, Add add) {
  const Layer s = problem.shapes[layer];
  const int r = s.r;
  bool finite = true;
  for (std::int64_t at = begin; at < end; at += length) {
    const int count = int(std::min<std::int64_t>(length, end - at));
    const std::int64_t row = in_place          ? out.row_stride
                             : side == Side::B ? r
                                               : (sums ? s.k : count) + padding;
    const std::int64_t offset = side == Side::A ? at : at * row;
    Acc* C = in_place ? static_cast<Acc*>(out.data) + offset : sums ? sums + offset : own_sums;
    add(at, count, C, row);
    if (!last_block) continue;
    with_dtype(problem.ref_dtype, [&](auto* type) {
      using Out = std::remove_pointer_t<decltype(type)>;
      Out* to = static_cast<Out*>(out.data) + (side == Side::A ? at : at * out.row_stride);
      const int rows = side == Side::A ? r : count, cols = side == Side::A ? count : r;
      if (row == cols && out.row_stride == cols)
        finite &= finish_row(C, rows * cols, to);
      else
        for (int p = 0; p < rows; ++p)
          finite &= finish_row(C + p * row, cols, to + p * out.row_stride);
    });
  }
  return finite;
}

// Adds W_i^T A_i or B_i W_i of clients first <= i < last to the sums of the clients before them, as
// average_chunks() says; W (last - first, r, r) are weighted rotations.
template <class Acc, class T>
bool apply_from(const Problem& problem, int layer, Side side, std::int64_t begin, std::int64_t end,
                int first, int last, const Acc* W, Ahead& ahead, const Matrix& out, Acc* sums,
                Acc* scratch) {
  const int r = problem.shapes[layer].r;
  const bool small = side == Side::B && is_small<Acc>(r);
  const bool few = by_few_rows<Acc>(problem, side, r);
  const bool in_place = is<Acc>(problem.ref_dtype) && !few && !(small && out.row_stride != r);
  T* panels = reinterpret_cast<T*>(scratch);
  Acc *own_sums = scratch + client_group * chunk_elements(r),
      *turned = own_sums + chunk_elements(r);
  auto add = [&](std::int64_t at, int count, Acc* C, std::int64_t row) {
    const int at_once = clients_at_once(few ? few_rows : directions_at_once, r);
    for (int i = first; i < last; i += at_once) {
      const int group = std::min(at_once, last - i);
      const Into into = i == 0 ? Into::replaced : Into::continued;
      Term<Acc, T> terms[client_group];
      const T* packed[client_group];
      for (int c = 0; c < group; ++c) {
        const int index = (i + c) * problem.layers + layer, rank = problem.ranks[index];
        const Matrix& m = (side == Side::A ? problem.lora_A : problem.lora_B)[index];
        const Acc* Wi = W + std::size_t(i + c - first) * r * r;
        T* panel = panels + c * chunk_elements(r);
        if (small) {
          packed[c] = packed_block(problem.client_dtype, m, rank, r, at, count, panel);
          with_rank<Acc>(r, [&](auto R) { turn_matrix<R>(Wi, turned + c * r * lanes<Acc>); });
          continue;
        }
        const Block<T> X = block(side, problem.client_dtype, m, rank, at, count, panel);
        if (side == Side::A)
          terms[c] = {Wi, 1, r, X.data, X.direction, rank};
        else if constexpr (std::is_same_v<T, Acc>)
          terms[c] = {X.data, X.position, 1, Wi, r, rank};
      }
      if constexpr (std::is_same_v<T, Acc> && !many_registers)
        if (few && std::all_of(terms, terms + group, [=](auto& t) { return t.inner == r; })) {
          with_rank<Acc, few_rows>(r, [&](auto R) {
            for (int c = 0; c < group; ++c)
              few_rows_product<R>(i + c == 0, count, terms[c], C, row, ahead);
          });
          continue;
        }
      if (side == Side::A)
        product<true>(r, count, group, terms, into, C, row, ahead, turned);
      else if (small)
        with_rank<Acc>(r, [&](auto R) {
          position_product<R>(count, group, packed, turned, i == 0, C, ahead);
        });
      else if constexpr (std::is_same_v<T, Acc>)
        product<false>(count, r, group, terms, into, C, row, ahead);
    }
  };
  return average_chunks(problem, layer, side, begin, end, last == problem.clients, chunk_length(r),
                        in_place, panel_padding, out, sums, own_sums, add);
}

template <class Acc>
bool apply(const Problem& problem, int layer, Side side, std::int64_t begin, std::int64_t end,
           int first, int last, const Acc* W, Ahead& ahead, const Matrix& out, Acc* sums,
           Acc* scratch) {
  bool finite = true;
  with_client_type<Acc>(problem.shapes[layer].r, problem.client_dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    finite = apply_from<Acc, T>(problem, layer, side, begin, end, first, last, W, ahead, out, sums,
                                scratch);
  });
  return finite;
}

}  // namespace FEDROT_ISA
}  // namespace fedrot
