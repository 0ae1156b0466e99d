// The part of DLPack's binary interface (versions 1.x) that the caster reads, declared from its specification:
// https://dmlc.github.io/dlpack/latest/c_api.html. Names of fields are ours, layout is DLPack's.
#pragma once

#include <cstdint>

namespace seqkernels::dlpack {

struct Device {
  std::int32_t type;  // kCpu ...
  std::int32_t id;
};
constexpr std::int32_t kCpu = 1, kCuda = 2;

struct DataType {
  std::uint8_t code;  // kInt ...
  std::uint8_t bits;
  std::uint16_t lanes;
};
constexpr std::uint8_t kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6;

struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements; null means contiguous in row-major order
  std::uint64_t byte_offset;
};

struct Managed {  // in capsules named "dltensor"
  Tensor tensor;
  void* context;
  void (*deleter)(Managed*);
};

struct Version {
  std::uint32_t major, minor;
};

// The table behind type(tensor).__dlpack_c_exchange_api__, a capsule named "dlpack_exchange_api".
struct ExchangeApi {
  Version version;
  ExchangeApi* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_object;
  void* managed_tensor_to_object;
  int (*tensor_from_object)(void* object, Tensor* out);  // a view that owns nothing; may be null
  int (*current_work_stream)(std::int32_t device_type, std::int32_t device_id, void** out);
};

}  // namespace seqkernels::dlpack
