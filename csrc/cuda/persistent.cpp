// How a persistent recurrence is launched.
#include "cuda/persistent.h"

#include <map>
#include <mutex>
#include <set>
#include <string>
#include <tuple>
#include <utility>

#include "cuda/launch.h"

namespace seqkernels::persistent {
namespace {

using cuda::check;

constexpr int kClusters = 9;  // the first major compute capability with clusters
constexpr int kPortable = 8;  // blocks that every device with clusters takes
constexpr int kLargest = 16;  // blocks that some devices take when asked

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

Kernel kernel_of(const Plan& plan) {
  switch (plan.cell) {
    case CellKind::kLstm:
      return lstm_kernel(plan);
    case CellKind::kGru:
      return gru_kernel(plan);
    default:
      return rnn_kernel(plan);
  }
}

std::string name_of(const Plan& plan) {
  static const char* const cells[] = {"rnn", "rnn", "lstm", "gru"};
  static const char* const products[] = {"float16", "bfloat16", "tf32x3", "exact"};
  static const char* const tiers[] = {"a block each", "clusters", "a grid"};
  return std::string(cells[static_cast<int>(plan.cell)]) + (plan.backward ? "_backward_" : "_forward_") +
         products[static_cast<int>(plan.product)] + " (" + std::to_string(plan.slices) + " teams of " +
         std::to_string(plan.blocks) + " blocks, " + tiers[static_cast<int>(plan.tier)] + ")";
}

// Lets a kernel have all the shared memory of the current device, and the largest clusters, once: a limit for each plan
// would be another thread's too.
void allow(const void* kernel, int device, const char* name) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  const std::lock_guard lock(mutex);
  if (allowed.count({kernel, device}) != 0) return;
  const int bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), name);
  if (attribute(cudaDevAttrComputeCapabilityMajor, device) >= kClusters) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), name);
  }
  allowed.emplace(kernel, device);
}

int current() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

// Whether the current device has a place for a cluster of so many blocks, of the kernel that is asked for most.
bool has_clusters(int blocks, int bytes) {
  const Plan plan = layout(Tier::kCluster, CellKind::kLstm, Product::kBFloat16, false, 512, 8, 32, 8);
  const void* kernel = reinterpret_cast<const void*>(kernel_of(plan));
  allow(kernel, current(), "lstm_forward");
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(blocks);
  config.blockDim = kThreads;
  config.dynamicSmemBytes = static_cast<std::size_t>(bytes);
  config.attrs = &cluster;
  config.numAttrs = 1;
  int clusters = 0;
  const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  if (error != cudaSuccess) cudaGetLastError();  // a size that the device does not know
  return error == cudaSuccess && clusters > 0;
}

// The clusters, or blocks of a grid, that the device has room for at once. Asked once: it takes longer than a launch.
int places_for(const void* kernel, int device, const cudaLaunchConfig_t& config, const Plan& plan, const char* name) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, std::size_t, int>, int> found;
  const int cluster = plan.tier == Tier::kCluster ? plan.blocks : 0;
  const std::lock_guard lock(mutex);
  const auto [place, is_new] = found.try_emplace({kernel, device, config.dynamicSmemBytes, cluster}, 0);
  if (!is_new) return place->second;
  try {
    if (cluster != 0) {
      check(cudaOccupancyMaxActiveClusters(&place->second, kernel, &config), name);
    } else {
      int of_processor = 0;
      check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_processor, kernel, kThreads, config.dynamicSmemBytes),
            name);
      place->second = of_processor * attribute(cudaDevAttrMultiProcessorCount, device);
    }
  } catch (...) {
    found.erase(place);
    throw;
  }
  return place->second;
}

}  // namespace

Device current_device() {
  const int number = current();
  Device device{};
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, number);
  device.capability = 10 * major + attribute(cudaDevAttrComputeCapabilityMinor, number);
  device.processors = attribute(cudaDevAttrMultiProcessorCount, number);
  device.shared_memory = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, number);
  if (major >= kClusters) {
    for (const int blocks : {kLargest, kPortable}) {
      if (device.cluster == 0 && has_clusters(blocks, device.shared_memory)) device.cluster = blocks;
    }
  }
  return device;
}

void run(const Launch& launch, cudaStream_t stream) {
  const Plan& plan = launch.plan;
  const std::string name = name_of(plan);
  const Kernel kernel = kernel_of(plan);
  const void* function = reinterpret_cast<const void*>(kernel);
  const int device = current();
  allow(function, device, name.c_str());
  cudaLaunchConfig_t config{};
  config.blockDim = kThreads;
  config.dynamicSmemBytes = static_cast<std::size_t>(launch.memory.total);
  config.stream = stream;
  cudaLaunchAttribute how{};
  config.attrs = &how;
  int together = launch.slices;  // teams in a launch
  if (plan.tier != Tier::kBlock) {
    config.numAttrs = 1;
    if (plan.tier == Tier::kCluster) {
      how.id = cudaLaunchAttributeClusterDimension;
      how.val.clusterDim = {static_cast<unsigned>(plan.blocks), 1, 1};
      config.gridDim = static_cast<unsigned>(plan.blocks);
    } else {
      how.id = cudaLaunchAttributeCooperative;
      how.val.cooperative = 1;
    }
    const int places = places_for(function, device, config, plan, name.c_str());
    if (plan.tier == Tier::kCluster) {
      if (places == 0) throw std::runtime_error(name + ": the device has no place for such a cluster");
    } else {
      // Blocks wait for each other: all of a launch have to be on the device at once.
      together = least(together, places / (plan.blocks * launch.jobs));
      if (together == 0) {
        throw std::runtime_error(name + ": the device has places for " + std::to_string(places) + " blocks at once");
      }
    }
  }
  Launch part = launch;
  for (int first = 0; first < launch.slices; first += together) {
    part.first_slice = launch.first_slice + first;
    part.slices = least(together, launch.slices - first);
    config.gridDim = static_cast<unsigned>(part.jobs * part.slices * plan.blocks);
    void* arguments[] = {&part};
    check(cudaLaunchKernelExC(&config, function, arguments), name.c_str());
  }
}

}  // namespace seqkernels::persistent
