// The machine of the kernels: a block of threads, its tensor cores, its cluster and its grid. See core/persistent_*.h
// for what runs on it and core/emulator.h for the same on a processor.
#pragma once

#include "core/persistent_backward.h"
#include "core/persistent_forward.h"

namespace seqkernels::persistent {
namespace {

// Nanoseconds after which a block that waits for others gives up: the launch fails, instead of the machine.
constexpr std::uint64_t kPatience = 10'000'000'000;

class Deadline {
 public:
  __device__ void check() {
    if (++polls_ % 4096 != 0) return;
    std::uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    if (begin_ == 0) begin_ = now;
    if (now - begin_ > kPatience) __trap();
  }

 private:
  std::uint32_t polls_ = 0;
  std::uint64_t begin_ = 0;
};

extern __shared__ __align__(128) char shared_memory[];

class DeviceBlock {
 public:
  static constexpr int kHere = 1;
  SEQKERNELS_FN static int lane(int) { return static_cast<int>(threadIdx.x) % 32; }

  template <class R>
  class OfWarp {
   public:
    SEQKERNELS_FN R& operator[](int) { return own_; }

   private:
    R own_;
  };

  SEQKERNELS_FN char* shared(int offset) const { return shared_memory + offset; }
  template <class F>
  SEQKERNELS_FN void each_thread(const F& f) const {
    f(static_cast<int>(threadIdx.x));
  }
  template <class F>
  SEQKERNELS_FN void each_warp(const F& f) const {
    f(static_cast<int>(threadIdx.x) / 32);
  }
  SEQKERNELS_FN void sync() const { __syncthreads(); }
  SEQKERNELS_FN void team_sync(Tier tier) const {
    __syncthreads();
#if __CUDA_ARCH__ >= 900
    if (tier == Tier::kCluster) {
      asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
    }
#endif
  }

  SEQKERNELS_FN void fetch(void* to, const void* from, int size) const {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address(to)), "l"(from), "r"(size) : "memory");
  }
  SEQKERNELS_FN void end_fetch() const { asm volatile("cp.async.commit_group;" ::: "memory"); }
  SEQKERNELS_FN void await_fetched(int pending) const {
    if (pending >= 1) {
      asm volatile("cp.async.wait_group 1;" ::: "memory");
    } else {
      asm volatile("cp.async.wait_group 0;" ::: "memory");
    }
  }

  // Barriers of a cluster: one arrival, that of the thread which announces the bytes.
  SEQKERNELS_FN void begin_barriers(int offset) const {
#if __CUDA_ARCH__ >= 900
    for (int slot = 0; slot < kSlots + kNorms; ++slot) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(shared(offset + slot * 8))) : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
  }
  SEQKERNELS_FN void expect(int barrier, int bytes) const {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(shared(barrier))), "r"(bytes)
                 : "memory");
#endif
  }
  SEQKERNELS_FN void await(int barrier, int parity) const {
#if __CUDA_ARCH__ >= 900
    Deadline deadline;
    std::uint32_t done = 0;
    while (true) {
      asm volatile(
          "{\n.reg .pred p;\n"
          "mbarrier.try_wait.parity.relaxed.cluster.shared::cta.b64 p, [%1], %2;\n"
          "selp.u32 %0, 1, 0, p;\n}"
          : "=r"(done)
          : "r"(address(shared(barrier))), "r"(parity)
          : "memory");
      if (done) break;
      deadline.check();
    }
    // Of shared memory alone: an acquire of all memory empties the first cache.
    asm volatile("fence.acquire.sync_restrict::shared::cluster.cluster;" ::: "memory");
#endif
  }
  SEQKERNELS_FN void put16(int block, int offset, const std::uint32_t (&x)[4], int barrier) const {
#if __CUDA_ARCH__ >= 900
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                     of_block(block, offset)),
                 "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(of_block(block, barrier))
                 : "memory");
#endif
  }
  SEQKERNELS_FN void put8(int block, int offset, const float* from, int barrier) const {
#if __CUDA_ARCH__ >= 900
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(
                     of_block(block, offset)),
                 "f"(from[0]), "f"(from[1]), "r"(of_block(block, barrier))
                 : "memory");
#endif
  }

  // Flags of a grid.
  SEQKERNELS_FN void publish(std::uint32_t* flag, std::uint32_t epoch) const {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(epoch) : "memory");
  }
  SEQKERNELS_FN void poll(const std::uint32_t* flag, std::uint32_t epoch) const {
    Deadline deadline;
    while (true) {
      std::uint32_t found;
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(found) : "l"(flag) : "memory");
      if (found >= epoch) return;
      deadline.check();
    }
  }

  SEQKERNELS_FN static void load16(const void* from, std::uint32_t (&to)[4]) {
    const uint4 x = *static_cast<const uint4*>(from);
    to[0] = x.x;
    to[1] = x.y;
    to[2] = x.z;
    to[3] = x.w;
  }
  SEQKERNELS_FN static void store16(void* to, const std::uint32_t (&from)[4]) {
    *static_cast<uint4*>(to) = make_uint4(from[0], from[1], from[2], from[3]);
  }
  SEQKERNELS_FN static void store8(float* to, const float* from) {
    *reinterpret_cast<float2*>(to) = make_float2(from[0], from[1]);
  }
  // What other multiprocessors wrote, which the first cache may hold as it was.
  SEQKERNELS_FN static void load_fresh16(const void* from, std::uint32_t (&to)[4]) {
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "l"(from)
                 : "memory");
  }
  SEQKERNELS_FN static float load_fresh(const float* from) {
    float x;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(x) : "l"(from) : "memory");
    return x;
  }

  SEQKERNELS_FN static void load_fresh8(const void* from, float (&to)[2]) {
    asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];" : "=f"(to[0]), "=f"(to[1]) : "l"(from) : "memory");
  }

  SEQKERNELS_FN static void load_rows(const char* rows, int row, Operand<DeviceBlock>& to) {
    const int l = lane(0);
    std::uint32_t (&x)[4] = to.word[0];
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address(rows + l % 8 * row + l / 8 * 16))
                 : "memory");
  }

  template <class E, class A>
  SEQKERNELS_FN static void mma(Sum<DeviceBlock, E>& sum, const A& tile_of, const Operand<DeviceBlock>& operand,
                                int half) {
    const std::uint32_t* a = tile_of(0);
    const std::uint32_t* b = operand.word[0] + 2 * half;
    float* c = sum.value[0];
    if constexpr (E::kProduct == Product::kFloat16) {
      asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
          "{%0, %1, %2, %3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else if constexpr (E::kProduct == Product::kBFloat16) {
      asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
          "{%0, %1, %2, %3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
      std::uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
#pragma unroll
      for (int i = 0; i < 4; ++i) parts(a[i], a_high[i], a_low[i]);
#pragma unroll
      for (int i = 0; i < 2; ++i) parts(b[i], b_high[i], b_low[i]);
      mma_tf32(c, a_low, b_high);
      mma_tf32(c, a_high, b_low);
      mma_tf32(c, a_high, b_high);
    }
  }

  // What all lanes have together, in each of them.
  SEQKERNELS_FN static void add(float (&x)[kHere]) {
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2) x[0] += __shfl_xor_sync(~0u, x[0], apart);
  }

  // The lanes that share rows add up, and keep the columns that tensor cores would have left them.
  template <class E>
  SEQKERNELS_FN static void gather(Sum<DeviceBlock, E>& sum) {
    float* all = sum.value[0];
    const bool upper = lane(0) & 2, odd = lane(0) & 1;
    float half[8];  // of the four columns that this lane and the next one share: of row g, then of row g + 8
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int low = i / 4 * 8 + i % 4, high = low + 4;
      const float given = __shfl_xor_sync(~0u, upper ? all[low] : all[high], 2);
      half[i] = (upper ? all[high] : all[low]) + given;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int low = i / 2 * 4 + i % 2, high = low + 2;
      const float given = __shfl_xor_sync(~0u, odd ? half[low] : half[high], 1);
      all[i] = (odd ? half[high] : half[low]) + given;
    }
  }

 private:
  SEQKERNELS_FN static std::uint32_t address(const void* p) {
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
  }
  SEQKERNELS_FN std::uint32_t of_block(int block, int offset) const {
    std::uint32_t found = 0;
#if __CUDA_ARCH__ >= 900
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(found) : "r"(address(shared(offset))), "r"(block));
#endif
    return found;
  }
  SEQKERNELS_FN static void parts(std::uint32_t x, std::uint32_t& high, std::uint32_t& low) {
    // Volatile, so that parts of weights are not made once for all steps: there are no registers for them.
    asm volatile("cvt.rna.tf32.f32 %0, %1;" : "=r"(high) : "f"(bits_as<float>(x)));
    const float rest = bits_as<float>(x) - bits_as<float>(high);
    asm volatile("cvt.rna.tf32.f32 %0, %1;" : "=r"(low) : "f"(rest));
  }
  SEQKERNELS_FN static void mma_tf32(float* c, const std::uint32_t* a, const std::uint32_t* b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
};

}  // namespace
}  // namespace seqkernels::persistent
