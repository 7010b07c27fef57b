// The only file that knows Python: raw pointers and sizes in, fedrot::cpu out.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "cpu/engine.h"
#include "cpu/kernels.h"
#include "problem.h"

namespace py = pybind11;
using fedrot::Matrix;

namespace {

using Pointers = std::vector<std::uintptr_t>;
using Strides = std::vector<std::int64_t>;

std::vector<Matrix> matrices(const Pointers& pointers, const Strides& strides) {
  if (pointers.size() != strides.size()) throw std::invalid_argument("one stride per pointer");
  std::vector<Matrix> table(pointers.size());
  for (std::size_t i = 0; i < table.size(); ++i)
    table[i] = {reinterpret_cast<void*>(pointers[i]), strides[i]};
  return table;
}

// The tables of a call, kept alive while it runs. Built from arguments that Python has checked.
struct Call {
  std::vector<fedrot::Layer> shapes;
  std::vector<int> ranks;
  std::vector<Matrix> lora_A, lora_B, ref_A, ref_B;
  std::vector<double> weights;
  fedrot::Problem problem;

  Call(const std::vector<std::tuple<std::int64_t, std::int64_t, int>>& sizes,
       std::vector<int> client_ranks, const std::vector<Pointers>& pointers,
       const std::vector<Strides>& strides, std::vector<double> client_weights, int client_dtype,
       int ref_dtype, double lam, int align, bool proper)
      : ranks(std::move(client_ranks)),
        lora_A(matrices(pointers.at(0), strides.at(0))),
        lora_B(matrices(pointers.at(1), strides.at(1))),
        ref_A(matrices(pointers.at(2), strides.at(2))),
        ref_B(matrices(pointers.at(3), strides.at(3))),
        weights(std::move(client_weights)) {
    for (const auto& [d, k, r] : sizes) shapes.push_back({d, k, r});
    const std::size_t layers = shapes.size(), tensors = weights.size() * layers;
    if (ranks.size() != tensors || lora_A.size() != tensors || lora_B.size() != tensors ||
        ref_A.size() != layers || ref_B.size() != layers)
      throw std::invalid_argument("tables of different length");
    problem = {int(weights.size()),
               int(layers),
               fedrot::DType(client_dtype),
               fedrot::DType(ref_dtype),
               shapes.data(),
               ranks.data(),
               lora_A.data(),
               lora_B.data(),
               ref_A.data(),
               ref_B.data(),
               weights.data(),
               lam,
               fedrot::Align(align),
               proper};
  }
  Call(const Call&) = delete;
};

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Native CPU kernels; called by fedrot_kernels.backends.cpu.";
  m.attr("instruction_set") = fedrot::cpu::instruction_set();
  py::class_<Call>(m, "Call").def(
      py::init<const std::vector<std::tuple<std::int64_t, std::int64_t, int>>&, std::vector<int>,
               const std::vector<Pointers>&, const std::vector<Strides>&, std::vector<double>, int,
               int, double, int, bool>());
  m.def(
      "align_aggregate",
      [](const Call& call, const Pointers& out_A, const Strides& stride_A, const Pointers& out_B,
         const Strides& stride_B, int threads) {
        const std::vector<Matrix> A = matrices(out_A, stride_A), B = matrices(out_B, stride_B);
        py::gil_scoped_release release;
        return fedrot::cpu::align_aggregate(call.problem, A.data(), B.data(), threads);
      },
      "Fill the outputs; False where a value was not finite.");
  m.def(
      "align",
      [](const Call& call, const Pointers& out, int threads) {
        py::gil_scoped_release release;
        return fedrot::cpu::align(call.problem, reinterpret_cast<void* const*>(out.data()),
                                  threads);
      },
      "Fill the rotations; False where a value was not finite.");
  m.def(
      "polar",
      [](std::uintptr_t M, std::uintptr_t out, long batch, int rows, int cols, bool is_double,
         bool proper, int threads) {
        py::gil_scoped_release release;
        return fedrot::cpu::polar(reinterpret_cast<const void*>(M), reinterpret_cast<void*>(out),
                                  batch, rows, cols, is_double, proper, threads);
      },
      "Fill the polar factors; the index of a matrix that is not finite, or -1.");
}
