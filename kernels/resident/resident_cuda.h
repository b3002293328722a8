// A decode step's selection, answer and recall between two GPUs, without a host in between.
//
// The service's GPU runs a *resident* kernel (LaunchServe) that waits for queries; the decode GPU
// runs one kernel per layer (LaunchStep) that sends them, attends to what it holds meanwhile, and
// then to what it was sent:
//
//   decode GPU                                      service GPU
//   queries ──────── request window ──────────────▶ rank, score, exact zone (select.h)
//   sinks and window attended meanwhile             directory: which exact records the hot cache
//                                                   lacks, and which slots they take
//   slots ◀───────── missing records, then slots ── pushed as soon as the exact zone is known
//   records of those slots attended
//   merged by log-sum-exp ◀──── attention state ─── of the coded and the estimated zone
//
// A *pair* is one (sequence, KV head); a *round* one layer of one step, all its pairs. Rounds are
// numbered from 1 in the order of layers; the number is the flag in every line (lines.cuh). The
// directory of the hot cache lies with the service, which alone writes the cache: the decode GPU
// keeps no books. Both ends see the other's memory by peer access or CUDA IPC
// (../comm/peer_window.h).
//
// Who may do what: one decode GPU per set of windows; its steps run one after the other. A pair's
// arrays (SelectCudaPair) may change only while no round is under way. A resident kernel holds its
// multiprocessors until it is stopped: cap it (ServeParams::blocks), and never wait for the whole
// device while it runs.
#ifndef CLUSTERKV_KERNELS_RESIDENT_RESIDENT_CUDA_H_
#define CLUSTERKV_KERNELS_RESIDENT_RESIDENT_CUDA_H_

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>

#include "kernels/attention/attention_cuda.h"
#include "kernels/base/element_type.h"
#include "kernels/codec/record_format.h"
#include "kernels/select/select_cuda.h"

namespace clusterkv::kernels {

// What both ends agree on when they attach.
struct ResidentShape {
  int32_t layers = 0;                                 // of the model that ask, 1 or more
  int32_t pairs = 0;                                  // of a step: sequences × KV heads
  int32_t group = 0;                                  // query heads per KV head, 1 to 8
  int32_t head_dim = 0;                               // a multiple of 16, 16 to 128
  ElementType query_type = ElementType::kBFloat16;    // as they travel, and the outputs
  ElementType element_type = ElementType::kBFloat16;  // of keys and values
  RecordFormat format = RecordFormat::kRaw;
  int32_t max_exact =
      0;              // records that a reply may name: the budget or more, up to 128 and `slots`
  int32_t slots = 0;  // of the hot cache per pair and layer: a multiple of 32, up to 512
};

// Bytes of the shared memory areas, multiples of 256. Windows are zeroed once, before both ends
// start; the hot cache needs no setting; the directory is set by LaunchForget.
int64_t RequestWindowBytes(const ResidentShape& shape);  // on the service's GPU
int64_t ReplyWindowBytes(const ResidentShape& shape);    // on the decode GPU
int64_t HotCacheBytes(const ResidentShape& shape);       // on the decode GPU
int64_t DirectoryBytes(const ResidentShape& shape);      // on the service's GPU
// Between processes a window is an allocation of its own, in multiples of this: smaller ones may
// share what is exported. The decode GPU's has the reply window, and behind it the hot cache.
constexpr int64_t kExportedBytes = 2 << 20;

// Written by the resident kernel but for `stop`; in the service GPU's memory, zeroed once.
struct ServeControl {
  uint32_t stop;      // of the first group: not 0: the kernel ends, when it has answered what came
  uint32_t given_up;  // 1: no query came for idle_ns
  uint64_t tickets;   // pairs taken, counted over the launch
  uint64_t served;    // pairs answered, over all launches
  uint64_t pushed;    // records sent, over all launches
};

// The service's end. Pointers are device memory of the service's GPU unless said otherwise.
struct ServeParams {
  ResidentShape shape;
  SelectCudaParams select;                // blocks_per_pair: 1 to 16
  const SelectCudaPair* pairs = nullptr;  // [layers, pairs]; `queries` is not read
  int32_t blocks = 0;                     // of the kernel at most: a multiprocessor each
  const void* requests = nullptr;
  void* replies = nullptr;    // the decode GPU's
  void* hot_cache = nullptr;  // the decode GPU's
  void* directory = nullptr;
  ServeControl* control = nullptr;
  void* workspace = nullptr;  // ServeWorkspaceBytes, 256-byte aligned
  uint64_t first_round = 1;   // the next round that the decode GPU will ask for
  uint64_t rounds = 0;        // ends after so many; 0: when it is stopped
  uint64_t idle_ns = 0;       // ends when no query came for so long; 0: never
  // Of a pair's index, asked for into the second cache before its queries come. All pairs' together
  // should fit there; 0: none.
  int64_t prefetch_bytes = 0;
  // What was selected, for tests and figures; may be null.
  int32_t* exact_count = nullptr;  // [layers, pairs]
  int32_t* positions = nullptr;    // [layers, pairs, max_exact], in no particular order
};

// For the current device, as LaunchServe; 0 where that would be refused. `pairs_at_once`, where not
// null: how many pairs the kernel answers at a time (so many clusters of blocks are resident).
int64_t ServeWorkspaceBytes(const ServeParams& params, int32_t* pairs_at_once = nullptr);
// The most clusters per KV head with which LaunchServe would take `params`, whatever their
// select.max_clusters is, as far as shared memory goes; 0: refused for something else.
int32_t MostServedClusters(ServeParams params);

// Groups that one kernel serves at most.
constexpr int32_t kMaxTogether = 8;
// Starts a resident kernel on `stream`, whose work ends with it, for a group or for several, each
// with a decode GPU's end of its own. All blocks work for the group that asks; of several that do,
// for the one whose last round is longer ago. `blocks`, `idle_ns` and the blocks per pair are the
// same in all; idle_ns is since the last queries of any. Errors: cudaErrorInvalidValue for shapes
// out of the ranges above, those that answer_pair.cuh does not take, `blocks` smaller than a
// pair's, too many groups; whatever the launch reports.
cudaError_t LaunchServe(const ServeParams* groups, int32_t count, cudaStream_t stream);

// Stops the kernel that runs on `stream`, `control` being its first group's, and waits for its end:
// within a few hundred microseconds for each of its groups, also in the middle of a round. `other`:
// a stream of the same device that nothing waits on. To go on, of each group: `stop` back to 0,
// first_round = served / pairs + 1 (a round that was answered in part is answered once more, to the
// same effect) and `served` the pairs of the rounds before it. Errors: what either stream met.
cudaError_t StopServe(ServeControl* control, cudaStream_t stream, cudaStream_t other);

// Empties the hot cache's directory of pairs [first, first + count) in all layers: their sequence
// is new. While no round is under way; before the first one of all pairs.
cudaError_t LaunchForget(const ResidentShape& shape, void* directory, int32_t first, int32_t count,
                         cudaStream_t stream);

// What the decode GPU holds of one (layer, pair).
struct StepPair {
  DeviceRawRun sinks;
  DeviceRawRun window;
  const int64_t* window_tokens = nullptr;  // where not null: the window's tokens, at most window's
};

// The decode GPU's end. Pointers are its own device memory unless said otherwise.
struct StepParams {
  ResidentShape shape;
  float scale = 0;                   // of the logits
  const StepPair* pairs = nullptr;   // [layers, pairs]
  void* requests = nullptr;          // the service GPU's
  const void* replies = nullptr;     // ReplyWindowBytes
  const void* hot_cache = nullptr;   // HotCacheBytes
  const uint64_t* rounds = nullptr;  // rounds before this step; advanced by LaunchEndStep
  uint32_t* status = nullptr;        // StepStatus bits are set in it; zeroed by the caller
  uint64_t timeout_ns = 0;           // for a reply; 0: waits for ever
  float lost = std::numeric_limits<float>::quiet_NaN();  // every output after a timeout
};
enum StepStatus : uint32_t { kStepSlotsMissing = 1, kStepStateMissing = 2 };

// What a launch does; ask and attend together unless the caller has work to put in between.
// kStepAlone, for measuring: attends to what the last reply named, whatever its round, and asks
// nothing.
enum StepPart : int {
  kStepAsk = 1,
  kStepAttend = 2,
  kStepWhole = 3,
  kStepStale = 4,
  kStepAlone = kStepAttend | kStepStale
};

// One layer of one step: queries [pairs, group, head_dim] of query_type to output, likewise, and
// where lse is not null to its log-sum-exp [pairs, group]. Asynchronous on `stream`; may be
// captured in a graph and replayed. After a timeout the outputs concerned are `lost` and the status
// says so. Errors: cudaErrorInvalidValue; whatever the launch reports.
cudaError_t LaunchStep(const StepParams& params, int32_t layer, StepPart part, const void* queries,
                       void* output, float* lse, cudaStream_t stream);
// After the last layer of a step: `rounds` (device memory) grows by the layers.
cudaError_t LaunchEndStep(const ResidentShape& shape, uint64_t* rounds, cudaStream_t stream);

}  // namespace clusterkv::kernels

#endif  // CLUSTERKV_KERNELS_RESIDENT_RESIDENT_CUDA_H_
