// Data moved between the lanes of vectors: transposition, and where the largest element is.
#pragma once

#include <utility>

#include "simd.h"

namespace fedrot {
inline namespace FEDROT_ISA {

// Lane i of the result is lane at[i] of v, or lane at[i] - lanes of w; V may hold integers.
template <int... at, class V>
inline V shuffle(V v, V w) {
#if defined(__clang__)
  return __builtin_shufflevector(v, w, at...);
#else
  return __builtin_shuffle(v, w, decltype(v < w){at...});
#endif
}

template <class T>
using LaneIndices = std::make_integer_sequence<int, lanes<T>>;

// The elements of a and b in turn, the first halves or the second halves.
template <bool second, class V, int... I>
inline V interleave(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int L = sizeof...(I), first = second ? L / 2 : 0;
  return shuffle<(first + I / 2 + I % 2 * L)...>(a, b);
}

// rows[j][i] <- rows[i][j], lanes<T> rows.
template <class T>
inline void transpose(Vector<T>* rows) {
  constexpr int L = lanes<T>;
  constexpr LaneIndices<T> all;
  for (int stage = 1; stage < L; stage *= 2) {
    Vector<T> next[L];
    for (int i = 0; i < L / 2; ++i) {
      next[2 * i] = interleave<false>(rows[i], rows[i + L / 2], all);
      next[2 * i + 1] = interleave<true>(rows[i], rows[i + L / 2], all);
    }
    for (int i = 0; i < L; ++i) rows[i] = next[i];
  }
}

// The lanes of v moved down by `distance`, around the end.
template <int distance, class V, int... I>
inline V rotate_lanes_by(V v, std::integer_sequence<int, I...>) {
  constexpr int L = sizeof...(I);
  return shuffle<((I + distance) % L)...>(v, v);
}

// Lanes are added pairwise, in the same order on every call.
template <class T, int half = lanes<T> / 2>
inline T horizontal_sum(Vector<T> v) {
  if constexpr (half == 0)
    return v[0];
  else
    return horizontal_sum<T, half / 2>(v + rotate_lanes_by<half>(v, LaneIndices<T>()));
}

// Every lane of `best` and `at` <- the largest of `best` and its `at`, of equals the smallest `at`.
template <int distance, class T>
inline void largest_lane(Vector<T>& best, Mask<T>& at) {
  constexpr LaneIndices<T> all;
  const Vector<T> other = rotate_lanes_by<distance>(best, all);
  const Mask<T> other_at = rotate_lanes_by<distance>(at, all);
  const Mask<T> better = (other > best) | ((other == best) & (other_at < at));
  best = better ? other : best;
  at = better ? other_at : at;
  if constexpr (distance > 1) largest_lane<distance / 2, T>(best, at);
}

template <class T, int... I>
inline Mask<T> lane_numbers(std::integer_sequence<int, I...>) {
  return Mask<T>{I...};
}

// The first i with the largest |x[i]|, begin <= i < end; x is readable, and zero, for a vector
// more.
template <class T>
inline int largest_at(const T* x, int begin, int end) {
  Vector<T> best = magnitude_of<T>(load(x + begin));
  Mask<T> here = lane_numbers<T>(LaneIndices<T>()), at = here;
  for (int i = begin + lanes<T>; i < end; i += lanes<T>) {
    const Vector<T> size = magnitude_of<T>(load(x + i));
    here += lanes<T>;
    at = size > best ? here : at;
    best = size > best ? size : best;
  }
  largest_lane<lanes<T> / 2, T>(best, at);
  return begin + int(at[0]);
}

}  // namespace FEDROT_ISA
}  // namespace fedrot
