// The only file that knows Python: tensors, or raw pointers and sizes, in; fedrot::cpu out.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "cpu/engine.h"
#include "cpu/finite.h"
#include "cpu/kernels.h"
#include "cpu/threads.h"
#include "device.h"
#include "problem.h"
#include "tables.h"

namespace py = pybind11;
using fedrot::Matrix;
using fedrot::Tables;

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

// Tables of tensors that Python has checked.
Tables checked(const std::vector<std::tuple<std::int64_t, std::int64_t, int>>& shapes,
               const std::vector<int>& ranks, const std::vector<Pointers>& pointers,
               const std::vector<Strides>& strides, int client_dtype, int ref_dtype) {
  Tables tables{fedrot::DType(client_dtype),
                fedrot::DType(ref_dtype),
                {},
                ranks,
                matrices(pointers.at(0), strides.at(0)),
                matrices(pointers.at(1), strides.at(1)),
                matrices(pointers.at(2), strides.at(2)),
                matrices(pointers.at(3), strides.at(3))};
  for (const auto& [d, k, r] : shapes) tables.shapes.push_back({d, k, r});
  const std::size_t layers = shapes.size(), tensors = ranks.size();
  if (tables.lora_A.size() != tensors || tables.lora_B.size() != tensors ||
      tables.ref_A.size() != layers || tables.ref_B.size() != layers)
    throw std::invalid_argument("tables of different length");
  return tables;
}

// Reads tensors of the given Python types through the exchange API of their framework.
class Reader {
 public:
  Reader(const py::capsule& api, const py::tuple& types) : types_(types) {
    const auto* table = static_cast<const fedrot::dlpack::ExchangeApi*>(
        PyCapsule_GetPointer(api.ptr(), fedrot::dlpack::capsule_name));
    if (!table) throw py::error_already_set();
    if (table->major != fedrot::dlpack::major_version || !table->show)
      throw py::value_error("a DLPack exchange API of another version");
    show_ = table->show;
  }

  std::optional<Tables> read(const py::list& lora_A, const py::list& lora_B, const py::list& ref_A,
                             const py::list& ref_B) const {
    const auto a = objects(lora_A), b = objects(lora_B), c = objects(ref_A), d = objects(ref_B);
    if (!a || !b || !c || !d) return {};
    std::optional<Tables> tables = fedrot::read(show_, sizeof(PyObject), *a, *b, *c, *d);
    PyErr_Clear();  // of a tensor that could not be shown
    return tables;
  }

 private:
  // Nothing where one is of another type, whose data may be no plain memory.
  std::optional<std::vector<void*>> objects(const py::list& list) const {
    std::vector<void*> table(list.size());
    for (std::size_t i = 0; i < table.size(); ++i) {
      PyObject* object = PyList_GET_ITEM(list.ptr(), py::ssize_t(i));
      bool known = false;
      for (const py::handle type : types_) known |= type.is(py::type::handle_of(object));
      if (!known) return {};
      table[i] = object;
    }
    return table;
  }

  py::tuple types_;
  fedrot::dlpack::Show show_;
};

struct Outputs {
  std::vector<Matrix> A, B;
};

void define_device(py::module_& m) {
  namespace device = fedrot::device;
  py::class_<device::Sections>(m, "Sections")
      .def_readonly("bases", &device::Sections::bases)
      .def_readonly("layers", &device::Sections::layers)
      .def_readonly("clients", &device::Sections::clients)
      .def_readonly("covariance_units", &device::Sections::covariance_units)
      .def_readonly("apply_units", &device::Sections::apply_units)
      .def_readonly("size", &device::Sections::size);
  py::class_<device::Call>(m, "DeviceCall", "A call laid out for a GPU (csrc/device.h).")
      .def(py::init([](const Tables& tables, int align, bool aggregate, std::int64_t cache_bytes) {
        return device::Call(tables, fedrot::Align(align), aggregate, cache_bytes);
      }))
      .def_readonly("sections", &device::Call::sections)
      .def_readonly("partials", &device::Call::partials)
      .def_readonly("rotations", &device::Call::rotations)
      .def_property_readonly(
          "launches",
          [](const device::Call& call) {
            std::vector<std::array<std::int64_t, 4>> list;
            for (const device::Launch& l : call.launches)
              list.push_back({l.covariance_begin, l.covariance_end, l.apply_begin, l.apply_end});
            return list;
          })
      .def("pack", [](const device::Call& call, const Tables& tables, const Strides& bases,
                      const Strides& R, const Outputs& out, std::uintptr_t to) {
        call.pack(tables, bases, R, out.A, out.B, reinterpret_cast<std::int64_t*>(to));
      });
  m.def("rotations_in", &device::rotations_in);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Native CPU kernels; called by fedrot_kernels.backends.cpu.";
  m.attr("instruction_set") = fedrot::cpu::instruction_set();
  py::class_<Tables>(m, "Tables")
      .def(py::init(&checked))
      .def_property_readonly("clients", &Tables::clients)
      .def("move", &Tables::move)
      .def_readonly("ranks", &Tables::ranks)
      .def_property_readonly("shapes", [](const Tables& tables) {
        std::vector<std::tuple<std::int64_t, std::int64_t, int>> shapes;
        for (const fedrot::Layer& l : tables.shapes) shapes.emplace_back(l.d, l.k, l.r);
        return shapes;
      });
  py::class_<Reader>(m, "Reader")
      .def(py::init<const py::capsule&, const py::tuple&>())
      .def("read", &Reader::read, "The tables of a call that is plainly right, or None.");
  py::class_<Outputs>(m, "Outputs")
      .def(py::init([](const Pointers& A, const Strides& stride_A, const Pointers& B,
                       const Strides& stride_B) {
        return Outputs{matrices(A, stride_A), matrices(B, stride_B)};
      }));
  define_device(m);
  m.def(
      "align_aggregate",
      [](const Tables& tables, const std::vector<double>& weights, double lam, int align,
         bool proper, const Outputs& out, int threads) {
        if (out.A.size() != tables.shapes.size() || out.B.size() != tables.shapes.size())
          throw std::invalid_argument("one output per layer");
        const fedrot::Problem problem = tables.problem(weights, lam, fedrot::Align(align), proper);
        py::gil_scoped_release release;
        threads = fedrot::cpu::worthwhile_threads(problem, threads);
        return fedrot::cpu::align_aggregate(problem, out.A.data(), out.B.data(), threads) &&
               fedrot::cpu::unread_is_finite(problem, true, threads);
      },
      "Fill the outputs; False where a value was not finite.");
  m.def(
      "align",
      [](const Tables& tables, double lam, int align, bool proper, const Pointers& out,
         int threads) {
        if (out.size() != tables.ranks.size()) throw std::invalid_argument("one output per client");
        const std::vector<double> weights(tables.clients());
        const fedrot::Problem problem = tables.problem(weights, lam, fedrot::Align(align), proper);
        py::gil_scoped_release release;
        threads = fedrot::cpu::worthwhile_threads(problem, threads);
        return fedrot::cpu::align(problem, reinterpret_cast<void* const*>(out.data()), threads) &&
               fedrot::cpu::unread_is_finite(problem, false, threads);
      },
      "Fill the rotations; False where a value was not finite.");
  m.def(
      "gram",
      [](const Tables& tables, int r, std::uintptr_t out_A, std::uintptr_t out_B, int threads) {
        const std::vector<double> weights(tables.clients());
        const fedrot::Problem problem = tables.problem(weights, 1, fedrot::Align::joint, false);
        py::gil_scoped_release release;
        threads = fedrot::cpu::worthwhile_threads(problem, threads);
        return fedrot::cpu::gram(problem, r, reinterpret_cast<void*>(out_A),
                                 reinterpret_cast<void*>(out_B), threads);
      },
      "Fill the Gram blocks, (L, S, S) each; False where a value was not finite.");
  m.def(
      "combine",
      [](const Tables& tables, int r, std::uintptr_t mix_A, std::uintptr_t mix_B,
         const Outputs& out, int threads) {
        if (out.A.size() != tables.shapes.size() || out.B.size() != tables.shapes.size())
          throw std::invalid_argument("one output per layer");
        const std::vector<double> weights(tables.clients());
        const fedrot::Problem problem = tables.problem(weights, 0, fedrot::Align::joint, false);
        py::gil_scoped_release release;
        threads = fedrot::cpu::worthwhile_threads(problem, threads);
        return fedrot::cpu::combine(problem, r, reinterpret_cast<const void*>(mix_A),
                                    reinterpret_cast<const void*>(mix_B), out.A.data(),
                                    out.B.data(), threads);
      },
      "Fill the outputs; False where a value of them was not finite.");
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
