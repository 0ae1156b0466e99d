// A round through distributed shared memory: st.async of 16 bytes into every block of a cluster, counted by an
// mbarrier.
#include "rounds.cuh"

namespace {

constexpr int kSlots = 2;
constexpr int kHeader = 128;  // bytes of shared memory before the slots: their barriers

extern __shared__ __align__(128) char shared_memory[];

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ std::uint32_t address(const void* p) { return static_cast<std::uint32_t>(__cvta_generic_to_shared(p)); }

__device__ std::uint32_t of_block(std::uint32_t here, int block) {
  std::uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(block));
  return there;
}

__device__ void cluster_sync() {
  __syncthreads();  // whole warps arrive
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

__device__ void await(std::uint32_t barrier, int parity) {
  Watchdog watchdog;
  while (true) {
    std::uint32_t done;
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    if (done) return;
    watchdog.check();
  }
}
#endif

// A cluster is a team; slots (kSlots, blocks, bytes) in shared memory.
__global__ void __launch_bounds__(kThreads) rounds(int blocks, int bytes, int count, Outcome* outcome) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  const int thread = static_cast<int>(threadIdx.x), rank = static_cast<int>(blockIdx.x) % blocks;
  const std::uint32_t barriers = address(shared_memory), slots = barriers + kHeader;
  if (thread == 0) {
    for (int slot = 0; slot < kSlots; ++slot) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barriers + slot * 8) : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  cluster_sync();
  unsigned long long wrong = 0;
  const long long begin = clock64();
  for (int round = 0; round < count; ++round) {
    const int slot = round % kSlots;
    const std::uint32_t barrier = barriers + slot * 8;
    const int into = slot * blocks * bytes;
    if (thread == 0) {
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(blocks * bytes)
                   : "memory");
    }
    const std::uint32_t x = word_of(rank, round);
    for (int i = thread; i < blocks * (bytes / 16); i += kThreads) {
      const int block = i % blocks, offset = into + rank * bytes + i / blocks * 16;
      asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %1, %1, %1}, [%2];" ::"r"(
                       of_block(slots + offset, block)),
                   "r"(x), "r"(of_block(barrier, block))
                   : "memory");
    }
    await(barrier, round / kSlots % 2);
    for (int i = thread; i < blocks * (bytes / 16); i += kThreads) {
      const uint4 found = *reinterpret_cast<const uint4*>(shared_memory + kHeader + into + i * 16);
      const std::uint32_t expected = word_of(i / (bytes / 16), round);
      wrong += found.x != expected || found.y != expected || found.z != expected || found.w != expected;
    }
    __syncthreads();  // all of this slot was read, before others learn of the next round
  }
  tell(outcome, wrong, begin);
  cluster_sync();
#endif
}

}  // namespace

int main() {
  if (attribute(cudaDevAttrComputeCapabilityMajor) < 9) return 0;  // no clusters
  const int memory = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  check(cudaFuncSetAttribute(rounds, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "cluster");
  for (int blocks : {2, 4, 8, 16}) {
    for (int bytes = 512; bytes <= 16384; bytes *= 2) {
      const int needed = kHeader + kSlots * blocks * bytes;
      if (needed > memory) continue;
      check(cudaFuncSetAttribute(rounds, cudaFuncAttributeMaxDynamicSharedMemorySize, needed), "cluster");
      cudaLaunchAttribute cluster{};
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
      cudaLaunchConfig_t config{};
      config.blockDim = kThreads;
      config.gridDim = static_cast<unsigned>(blocks);
      config.dynamicSmemBytes = static_cast<std::size_t>(needed);
      config.attrs = &cluster;
      config.numAttrs = 1;
      int most = 0;
      if (cudaOccupancyMaxActiveClusters(&most, rounds, &config) != cudaSuccess || most == 0) {
        cudaGetLastError();  // a size that this device does not know
        continue;
      }
      // One alone, and as many as the device has places for.
      for (int teams = 1; teams <= most; teams = teams < most ? most : most + 1) {
        config.gridDim = static_cast<unsigned>(teams * blocks);
        time_rounds("cluster", teams, blocks, bytes, [&](int count, Outcome* outcome) {
          check(cudaLaunchKernelEx(&config, rounds, blocks, bytes, count, outcome), "cluster");
        });
      }
    }
  }
  return 0;
}
