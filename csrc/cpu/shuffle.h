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

// A stage of a transposition: bit `stage` of the number of the row against that of the lane.
template <int stage, class T, int... i>
inline void exchange(Vector<T>& low, Vector<T>& high, std::integer_sequence<int, i...>) {
  constexpr int L = lanes<T>;
  const Vector<T> a = low, b = high;
  low = shuffle<(i & stage ? L + i - stage : i)...>(a, b);
  high = shuffle<(i & stage ? L + i : i + stage)...>(a, b);
}

// rows[j][i] <- rows[i][j], lanes<T> rows. With fewer, R a power of two, in groups of lanes: lane
// g R + p of rows[q] <-> lane g R + q of rows[p].
template <class T, int R = lanes<T>, int stage = R / 2>
inline void transpose(Vector<T>* rows) {
  if constexpr (stage > 0) {
    for (int p = 0; p < R; ++p)
      if (!(p & stage)) exchange<stage, T>(rows[p], rows[p + stage], LaneIndices<T>());
    transpose<T, R, stage / 2>(rows);
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

// Lane i <- the sum of all lanes of v[i], lanes<T> vectors.
template <class T, int half = lanes<T> / 2>
__attribute__((always_inline)) inline Vector<T> lane_sums(const Vector<T>* v) {
  constexpr LaneIndices<T> all;
  Vector<T> next[half];
  unrolled<half>([&](int i) {
    next[i] = interleave<false>(v[i], v[i + half], all) + interleave<true>(v[i], v[i + half], all);
  });
  if constexpr (half == 1)
    return next[0];
  else
    return lane_sums<T, half / 2>(next);
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
