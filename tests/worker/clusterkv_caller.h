/* What clusterkv_test.cc hands to an engine in C. */
#ifndef CLUSTERKV_TESTS_WORKER_CLUSTERKV_CALLER_H_
#define CLUSTERKV_TESTS_WORKER_CLUSTERKV_CALLER_H_

#include "worker/clusterkv.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  const char* name;
  uint32_t layers, kv_heads, query_heads, head_dim, prompt_tokens, steps;
  /* Of each layer: [prompt_tokens + steps, kv_heads, head_dim], and [steps, query_heads, head_dim],
   * and [kv_heads, head_dim]. */
  const float *const *keys, *const *values, *const *queries, *const *query_rms;
} caller_model;

/* outputs [steps, layers, query_heads, head_dim]. 0, or -1 and why. */
int caller_run(const char* target, const caller_model* model, float* outputs, char* message,
               size_t size);

#ifdef __cplusplus
}
#endif

#endif  // CLUSTERKV_TESTS_WORKER_CLUSTERKV_CALLER_H_
