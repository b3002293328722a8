/* ClusterKV for inference engines in plain C (C99 and later): KV of an engine's layers in,
 * attention output of its layers out, on the engine's own pointers and its own CUDA stream.
 *
 *   prefill   ckv_create, ckv_ingest each layer, ckv_seal
 *   decode    ckv_attach, and per token and layer: ckv_append its K and V, ckv_step its queries; at
 *             the end ckv_close, or ckv_release, which gives the service's memory back
 *   without the host, where ckv_join succeeds: the same calls then only launch kernels, and can be
 *             captured in a CUDA graph; ckv_settle at least every 256 tokens; ckv_leave
 *
 * The rules (who waits, what a failure leaves behind) are worker/engine.h's.
 *
 * Structs begin with `size`: set it to sizeof of the struct and zero the rest (CKV_INIT does both);
 * a later version adds fields at the end, whose zero means what was before. Every function that
 * returns int returns CKV_OK or an error's code, and never throws or exits; what went wrong is told
 * by ckv_error_message and ckv_error_reason to the thread that it went wrong on.
 *
 * Threads: an engine may be used by many at once, a sequence by one at a time.
 */
#ifndef CLUSTERKV_WORKER_CLUSTERKV_H_
#define CLUSTERKV_WORKER_CLUSTERKV_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define CKV_API_VERSION 1

/* What to do about it, by code; the reasons (proto/README.md) say what happened. */
enum {
  CKV_OK = 0,
  CKV_CANCELLED = 1,
  CKV_UNKNOWN = 2,
  CKV_INVALID_ARGUMENT = 3,  /* the caller's mistake */
  CKV_DEADLINE_EXCEEDED = 4, /* may pass: again */
  CKV_NOT_FOUND = 5,         /* no such sequence: prefill */
  CKV_ALREADY_EXISTS = 6,    /* the name is taken */
  CKV_PERMISSION_DENIED = 7,
  CKV_RESOURCE_EXHAUSTED = 8,  /* full: later */
  CKV_FAILED_PRECONDITION = 9, /* not in this state; STALE_BOOT_ID: prefill */
  CKV_ABORTED = 10,            /* released or evicted meanwhile: prefill */
  CKV_OUT_OF_RANGE = 11,
  CKV_UNIMPLEMENTED = 12,
  CKV_INTERNAL = 13,
  CKV_UNAVAILABLE = 14, /* no server: again */
  CKV_DATA_LOSS = 15,
  CKV_UNAUTHENTICATED = 16
};

typedef enum { CKV_FLOAT32 = 1, CKV_FLOAT16 = 2, CKV_BFLOAT16 = 3 } ckv_element_type;

typedef struct ckv_engine ckv_engine;
typedef struct ckv_sequence ckv_sequence;
typedef void* ckv_stream; /* a cudaStream_t; NULL with host pointers */

/* Zeroes a struct and sets its size. */
#define CKV_INIT(pointer) ckv_init((pointer), sizeof(*(pointer)))
void ckv_init(void* of, size_t size);

typedef struct {
  size_t size;
  const char* target;      /* "host:port" or "unix:path"; several shards by commas */
  const char* device;      /* whose the pointers are: "cpu" (NULL), "cuda", "cuda:N" */
  const char* worker_name; /* NULL: "engine" */
  const char *tls_ca, *tls_cert, *tls_key; /* files; NULL: no TLS */
  const char* tls_server_name;
  ckv_element_type output_type; /* 0: CKV_FLOAT32 */
  uint32_t hot_cache_tokens;    /* per KV head and layer; 0: 1,024 */
  uint32_t budget_tokens;       /* 0: the sequence's */
  uint32_t append_batch_tokens; /* 0: 16 */
  uint32_t threads;             /* that talk to the service; 0: 4 */
  uint32_t call_timeout_ms;     /* 0: 30,000 */
  uint64_t staging_bytes;       /* 0: 512 MiB */
  const char* links;            /* "peer,nccl,grpc", best first; NULL: "grpc" */
} ckv_options;

typedef struct {
  size_t size;
  const char* name; /* 1 to 256 bytes */
  uint32_t layers, kv_heads, query_heads, head_dim;
  ckv_element_type element_type; /* 0: CKV_BFLOAT16 */
  uint32_t prompt_tokens;
  uint32_t max_decode_tokens;
  const char* preset; /* NULL: "default" */
  const char* codec;  /* NULL: "raw" */
} ckv_sequence_options;

/* Rows [tokens, kv_heads, head_dim] of K and V; strides in bytes, 0: dense. */
typedef struct {
  size_t size;
  const void *keys, *values;
  int64_t first_token, tokens;
  int64_t token_stride, head_stride;
  const float* query_rms; /* [kv_heads, head_dim], host memory, or NULL */
} ckv_rows;

/* One sequence of a batch. */
typedef struct {
  ckv_sequence* sequence;
  const void* queries; /* [query_heads, head_dim] of the element type, dense */
  void* output;        /* [query_heads, head_dim] of the output type */
  int error;           /* out; on a GPU of what could not be begun alone */
} ckv_step_entry;
typedef struct {
  ckv_sequence* sequence;
  const void *key, *value; /* [kv_heads, head_dim] of one token */
  int64_t head_stride;     /* bytes; 0: dense */
} ckv_append_entry;

/* CKV_API_VERSION of the library. */
int ckv_api_version(void);
/* Of this thread's last failed call; "" before the first. Valid until this thread's next call. */
const char* ckv_error_message(void);
const char* ckv_error_reason(void); /* as SEQUENCE_NOT_FOUND */

/* *engine is set on success. */
int ckv_open(const ckv_options* options, ckv_engine** engine);
/* Closes its sequences too. NULL is ignored. */
void ckv_shutdown(ckv_engine* engine);

int ckv_create(ckv_engine* engine, const ckv_sequence_options* options, ckv_sequence** sequence);
int ckv_ingest(ckv_engine* engine, ckv_sequence* sequence, uint32_t layer, const ckv_rows* rows,
               ckv_stream stream);
int ckv_seal(ckv_engine* engine, ckv_sequence* sequence);

/* One that this engine sealed; or any sealed sequence by its name. */
int ckv_attach(ckv_engine* engine, ckv_sequence* sequence);
int ckv_attach_by_name(ckv_engine* engine, const char* name, ckv_sequence** sequence);
int ckv_append(ckv_engine* engine, uint32_t layer, const ckv_append_entry* entries, size_t count,
               ckv_stream stream);
int ckv_step(ckv_engine* engine, uint32_t layer, ckv_step_entry* entries, size_t count,
             ckv_stream stream);
int ckv_wait(ckv_engine* engine, ckv_sequence* sequence);

/* Makes a batch a group, which the service's GPU answers by itself; CKV_UNAVAILABLE says why not,
 * and the sequences are as before. Of a group any sequence does for the others. */
int ckv_join(ckv_engine* engine, ckv_sequence* const* sequences, size_t count);
int ckv_settle(ckv_engine* engine, ckv_sequence* sequence, ckv_stream stream);
int ckv_leave(ckv_engine* engine, ckv_sequence* sequence, ckv_stream stream);

/* The pointer is gone after either, whatever it returns. */
int ckv_close(ckv_engine* engine, ckv_sequence* sequence);
int ckv_release(ckv_engine* engine, ckv_sequence* sequence);

#ifdef __cplusplus
}
#endif

#endif  // CLUSTERKV_WORKER_CLUSTERKV_H_
