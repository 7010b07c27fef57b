// What is used of DLPack's C exchange API (dlpack.h 1.3): the table of functions that a framework
// hangs on its tensor type, one of which shows a tensor without a transfer of ownership. Major
// version 1 fixes the layout.
#pragma once

#include <cstdint>

namespace fedrot::dlpack {

constexpr const char* capsule_name = "dlpack_exchange_api";
constexpr std::uint32_t major_version = 1;
constexpr std::uint8_t float_code = 2, bfloat_code = 4;  // kDLFloat, kDLBfloat

struct Tensor {  // DLTensor
  void* data;
  std::int32_t device_type, device_id;
  std::int32_t ndim;
  std::uint8_t code, bits;
  std::uint16_t lanes;
  std::int64_t *shape, *strides;  // strides in elements
  std::uint64_t byte_offset;
};

// Borrows: shape and strides belong to the object. Returns 0, or -1 with a Python error set.
using Show = int (*)(void* object, Tensor* out);

struct ExchangeApi {  // DLPackExchangeAPI
  std::uint32_t major, minor;
  const void* previous_api;
  void (*allocate)();
  void (*export_owned)();
  void (*import_owned)();
  Show show;  // dltensor_from_py_object_no_sync; may be null
  void (*current_stream)();
};

}  // namespace fedrot::dlpack
