// Compiled once per instruction set with FEDROT_ISA naming it; dispatch.cpp chooses.
#include "kernels.h"

#include <algorithm>

#include "factors.h"
#include "gram.h"
#include "rotations.h"
#include "tile_factors.h"
#include "tile_gram.h"

namespace fedrot {
inline namespace FEDROT_ISA {

template <class Acc>
std::size_t scratch_size(int r) {
  return std::max(panel_scratch<Acc>(r), rotation_scratch<Acc>(r));
}

template <class Acc>
cpu::Kernels<Acc> table() {
  return {
      fetches_in_order<Acc>, scratch_size<Acc>,   rotation_scratch<Acc>,
      reference_size<Acc>,   load_reference<Acc>, covariance<Acc>,
      rotations<Acc>,        polars<Acc>,         apply<Acc>,
      gram_side<Acc>,        gram_scratch<Acc>,   gram<Acc>,
      mirror<Acc>,
  };
}

#if defined(__AMX_BF16__)
// The same, on the matrix unit where that pays.
template <>
cpu::Kernels<float> table<float>() {
  using Reference = cpu::Reference<float>;
  return {
      fetches_in_order<float>,
      [](int r) { return std::max(scratch_size<float>(r), tile_scratch(r)); },
      rotation_scratch<float>,
      [](const Layer& s) { return std::max(reference_size<float>(s), tile_reference_size(s)); },
      [](const Problem& p, int layer, float* panels, float* scratch) {
        return uses_tiles(p, p.shapes[layer].r) ? load_tile_reference(p, layer, panels)
                                                : load_reference<float>(p, layer, panels, scratch);
      },
      [](const Problem& p, int layer, int client, const Reference& reference, Ahead& ahead,
         float* M, float* scratch) {
        uses_tiles(p, p.shapes[layer].r)
            ? tile_covariance(p, layer, client, reference, M, scratch)
            : covariance<float>(p, layer, client, reference, ahead, M, scratch);
      },
      rotations<float>,
      polars<float>,
      [](const Problem& p, int layer, Side side, std::int64_t begin, std::int64_t end, int first,
         int last, const float* W, Ahead& ahead, const Matrix& out, float* sums, float* scratch) {
        return uses_tiles(p, p.shapes[layer].r)
                   ? tile_apply(p, layer, side, begin, end, first, last, W, out, sums, scratch)
                   : apply<float>(p, layer, side, begin, end, first, last, W, ahead, out, sums,
                                  scratch);
      },
      gram_side<float>,
      [](int clients, int r) {
        return std::max(gram_scratch<float>(clients, r), tile_gram_scratch(clients, r));
      },
      [](const Problem& p, int layer, Side side, int r, int first, int step, float* G,
         float* scratch) {
        gram_uses_tiles(p) ? tile_gram(p, layer, side, r, first, step, G, scratch)
                           : gram<float>(p, layer, side, r, first, step, G, scratch);
      },
      mirror<float>};
}
#endif

const cpu::Kernels<float>& kernels_float() {
  static const cpu::Kernels<float> entries = table<float>();
  return entries;
}
const cpu::Kernels<double>& kernels_double() {
  static const cpu::Kernels<double> entries = table<double>();
  return entries;
}

}  // namespace FEDROT_ISA
}  // namespace fedrot
