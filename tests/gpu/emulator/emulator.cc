
#include <atomic>
#include <cstdio>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "cuda_runtime.h"
#ifdef CLUSTERKV_SANITIZED
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_emulator {

Thread* current = nullptr;
dim3 block_dim, grid_dim;
int cluster_blocks = 1;

namespace {

constexpr size_t kStackBytes = 128 << 10;
// Shared memory as a block finds it, and how much of it behind the block's own must stay so.
constexpr unsigned char kSharedFill = 0xff;
constexpr size_t kSharedAlignment = 1024;
constexpr size_t kSharedGuard = 4096;

struct Barrier {
  int arrived = 0;
  uint64_t generation = 0;
  // Where those who have arrived came from.
  const char* file = nullptr;
  int line = 0;
};

struct Stack {
  void* pointer = nullptr;
  const void* bottom = nullptr;
  size_t bytes = 0;
  void* fake = nullptr;  // what AddressSanitizer keeps of it
};

struct Fiber {
  Thread thread;
  Stack stack;
  bool done = false;
  // While not null: not runnable until *waits_for differs from waits_while.
  const uint64_t* waits_for = nullptr;
  uint64_t waits_while = 0;
};

// Where the lanes of a mask meet, each with its words: those of a meeting stay while the next one's
// come, for when that is complete everybody has left the one before.
struct Meeting {
  Barrier barrier;
  uint32_t slots[2][32][8];
};

struct Warp {
  Meeting whole;
  std::map<uint32_t, Meeting> parts;  // by mask
};

struct Block {
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
  int live = 0;
  int votes = 0;
};

std::vector<Block> blocks;
Barrier cluster_barrier;
int cluster_live = 0;
std::vector<Fiber> fibers;
struct Free {
  void operator()(void* p) const { std::free(p); }
};
std::vector<std::unique_ptr<unsigned char, Free>> stacks;
Fiber* running = nullptr;
Stack scheduler;
const std::function<void()>* kernel = nullptr;
uint64_t launches = 0;

enum class Health { kWell, kFailed, kKnownToHaveFailed };
std::atomic<Health> health{Health::kWell};

extern "C" void ckv_emulator_switch(void** save, void* load);
asm(R"(
.text
.globl ckv_emulator_switch
ckv_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

// Goes on where the other stack was left, and comes back when this one is switched to. No local
// variable here may need AddressSanitizer: a thread's last switch never returns.
void Switch(Stack& from, const Stack& to) {
#ifdef CLUSTERKV_SANITIZED
  __sanitizer_start_switch_fiber(&from.fake, to.bottom, to.bytes);
#endif
  ckv_emulator_switch(&from.pointer, to.pointer);
#ifdef CLUSTERKV_SANITIZED
  __sanitizer_finish_switch_fiber(from.fake, nullptr, nullptr);
#endif
}

void Yield() { Switch(running->stack, scheduler); }

void FiberMain() {
#ifdef CLUSTERKV_SANITIZED
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.bottom, &scheduler.bytes);
#endif
  (*kernel)();
  running->done = true;
  Block& block = blocks[running->thread.block_in_cluster];
  --block.live;
  --cluster_live;
  // A thread that has left counts as arrived, as on the device.
  if (block.live > 0 && block.barrier.arrived == block.live) {
    block.barrier.arrived = 0;
    ++block.barrier.generation;
  }
  Yield();
  std::abort();
}

// Stops the program if the threads at the barrier have not come by the same line.
void CheckSite(Barrier& barrier, const char* file, int line) {
  if (barrier.arrived == 0) {
    barrier.file = file;
    barrier.line = line;
  } else if (barrier.line != line ||
             (barrier.file != file && std::strcmp(barrier.file, file) != 0)) {
    const dim3& at = current->thread_idx;
    std::fprintf(stderr, "cuda emulator: thread (%u, %u, %u) at %s:%d, others at %s:%d\n", at.x,
                 at.y, at.z, file, line, barrier.file, barrier.line);
    std::abort();
  }
}

void Wait(Barrier& barrier, int expected, const char* file, int line) {
  CheckSite(barrier, file, line);
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  running->waits_for = &barrier.generation;
  running->waits_while = barrier.generation;
  Yield();
}

void Prepare(Fiber& fiber, size_t index) {
  if (stacks.size() <= index) {
    stacks.emplace_back(static_cast<unsigned char*>(std::aligned_alloc(4096, kStackBytes)));
  }
  unsigned char* stack = stacks[index].get();
  void** top = reinterpret_cast<void**>(stack + kStackBytes - 64);
  *--top = nullptr;  // keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(&FiberMain);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack = {.pointer = top, .bottom = stack, .bytes = kStackBytes};
}

unsigned char* SharedOf(Block& block) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(block.shared.data());
  return reinterpret_cast<unsigned char*>((at + kSharedAlignment - 1) / kSharedAlignment *
                                          kSharedAlignment);
}

// Stops the program if the block wrote past its dynamic shared memory.
void CheckSharedGuard(Block& block, size_t shared_bytes) {
  const unsigned char* guard = SharedOf(block) + shared_bytes;
  for (size_t i = 0; i < kSharedGuard; ++i) {
    if (guard[i] == kSharedFill) continue;
    std::fprintf(stderr, "cuda emulator: shared memory of %zu bytes, written at %zu\n",
                 shared_bytes, shared_bytes + i);
    std::abort();
  }
}

void RunCluster(dim3 grid, dim3 block, size_t shared_bytes, int first_block, int count) {
  const int threads = static_cast<int>(block.x * block.y * block.z);
  blocks.assign(count, Block());
  fibers.assign(static_cast<size_t>(threads) * count, Fiber());
  cluster_barrier = Barrier();
  cluster_live = threads * count;
  for (int b = 0; b < count; ++b) {
    blocks[b].live = threads;
    blocks[b].warps.resize((threads + 31) / 32);
    blocks[b].shared.assign(shared_bytes + kSharedAlignment + kSharedGuard, kSharedFill);
    for (int t = 0; t < threads; ++t) {
      Fiber& fiber = fibers[static_cast<size_t>(b) * threads + t];
      const unsigned linear = static_cast<unsigned>(first_block + b);
      fiber.thread.thread_idx = dim3(t % block.x, t / block.x % block.y, t / (block.x * block.y));
      fiber.thread.block_idx =
          dim3(linear % grid.x, linear / grid.x % grid.y, linear / (grid.x * grid.y));
      fiber.thread.lane = t % 32;
      fiber.thread.warp = t / 32;
      fiber.thread.block_in_cluster = b;
      Prepare(fiber, static_cast<size_t>(b) * threads + t);
    }
  }
  const bool backwards = launches % 2 == 1;
  while (cluster_live > 0) {
    bool progress = false;
    for (size_t i = 0; i < fibers.size(); ++i) {
      Fiber& fiber = fibers[backwards ? fibers.size() - 1 - i : i];
      if (fiber.done) continue;
      if (fiber.waits_for != nullptr) {
        if (*fiber.waits_for == fiber.waits_while) continue;
        fiber.waits_for = nullptr;
      }
      progress = true;
      running = &fiber;
      current = &fiber.thread;
      Switch(scheduler, fiber.stack);
    }
    if (!progress) {
      std::fprintf(stderr, "cuda emulator: deadlock, block %d\n", first_block);
      std::abort();
    }
  }
  for (Block& b : blocks) CheckSharedGuard(b, shared_bytes);
}

}  // namespace

unsigned char* SharedMemory() { return SharedOf(blocks[current->block_in_cluster]); }

unsigned char* SharedMemoryOf(int rank) { return SharedOf(blocks[rank]); }

void SyncThreads(const char* file, int line) {
  Block& block = blocks[current->block_in_cluster];
  Wait(block.barrier, block.live, file, line);
}

int SyncThreadsCount(bool vote, const char* file, int line) {
  Block& block = blocks[current->block_in_cluster];
  SyncThreads(file, line);
  block.votes = 0;
  SyncThreads(file, line);
  block.votes += vote;
  SyncThreads(file, line);
  return block.votes;
}

void SyncCluster(const char* file, int line) { Wait(cluster_barrier, cluster_live, file, line); }

const uint32_t (*Meet(uint32_t mask, const uint32_t* words, int count, const char* file,
                      int line))[8] {
  Warp& warp = blocks[current->block_in_cluster].warps[current->warp];
  const int lane = current->lane;
  if (!(mask >> lane & 1u)) {
    std::fprintf(stderr, "cuda emulator: lane %d is not in mask %08x\n", lane, mask);
    std::abort();
  }
  Meeting& meeting = mask == 0xffffffffu ? warp.whole : warp.parts[mask];
  auto* const slots = meeting.slots[meeting.barrier.generation % 2];
  std::copy_n(words, count, slots[lane]);
  Wait(meeting.barrier, __builtin_popcount(mask), file, line);
  return slots;
}

void WaitForChange(const uint64_t* word) {
  running->waits_for = word;
  running->waits_while = *word;
  Yield();
}

void Fail() { health = Health::kFailed; }

bool Queue(cudaError_t* error) {
  const Health now = health;
  *error = now == Health::kKnownToHaveFailed ? cudaErrorLaunchFailure : cudaSuccess;
  return now == Health::kWell;
}

cudaError_t Look() {
  if (health == Health::kWell) return cudaSuccess;
  health = Health::kKnownToHaveFailed;
  return cudaErrorLaunchFailure;
}

cudaError_t Launch(dim3 grid, dim3 block, size_t shared_bytes, int cluster,
                   const std::function<void()>& body) {
  cudaError_t error = cudaSuccess;
  if (!Queue(&error)) return error;
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  kernel = &body;
  block_dim = block;
  grid_dim = grid;
  cluster_blocks = cluster;
  const int total = static_cast<int>(grid.x * grid.y * grid.z);
  for (int b = 0; b < total; b += cluster) RunCluster(grid, block, shared_bytes, b, cluster);
  ++launches;
  return cudaSuccess;
}

}  // namespace cuda_emulator
