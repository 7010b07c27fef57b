// Compiled once per instruction set with FEDROT_ISA naming it; dispatch.cpp chooses.
#include "kernels.h"

#include <algorithm>

#include "factors.h"
#include "gram.h"
#include "rotations.h"

namespace fedrot {
inline namespace FEDROT_ISA {

template <class Acc>
std::size_t scratch_size(int r) {
  return std::max(panel_scratch<Acc>(r), rotation_scratch<Acc>(r));
}

template <class Acc>
const cpu::Kernels<Acc>& table() {
  static const cpu::Kernels<Acc> entries{scratch_size<Acc>,
                                         rotation_scratch<Acc>,
                                         reference_size<Acc>,
                                         load_reference<Acc>,
                                         covariance<Acc>,
                                         rotations<Acc>,
                                         polars<Acc>,
                                         apply<Acc>,
                                         panel_width<Acc>,
                                         gram_scratch<Acc>,
                                         gram<Acc>};
  return entries;
}

const cpu::Kernels<float>& kernels_float() { return table<float>(); }
const cpu::Kernels<double>& kernels_double() { return table<double>(); }

}  // namespace FEDROT_ISA
}  // namespace fedrot
