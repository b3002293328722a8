/* An engine in C: the whole life of a sequence through clusterkv.h. See clusterkv_test.cc. */
#include "tests/worker/clusterkv_caller.h"

#include <stdio.h>
#include <string.h>

static int Fail(const char* what, char* message, size_t size) {
  snprintf(message, size, "%s: %s: %s", what, ckv_error_reason(), ckv_error_message());
  return -1;
}

static int Prefill(ckv_engine* engine, const caller_model* model, ckv_sequence** sequence) {
  ckv_sequence_options options;
  ckv_rows rows;
  uint32_t layer;
  CKV_INIT(&options);
  options.name = model->name;
  options.layers = model->layers;
  options.kv_heads = model->kv_heads;
  options.query_heads = model->query_heads;
  options.head_dim = model->head_dim;
  options.element_type = CKV_FLOAT32;
  options.prompt_tokens = model->prompt_tokens;
  options.max_decode_tokens = model->steps;
  if (ckv_create(engine, &options, sequence) != CKV_OK) return -1;
  for (layer = 0; layer < model->layers; ++layer) {
    CKV_INIT(&rows);
    rows.keys = model->keys[layer];
    rows.values = model->values[layer];
    rows.tokens = model->prompt_tokens;
    rows.query_rms = model->query_rms[layer];
    if (ckv_ingest(engine, *sequence, layer, &rows, NULL) != CKV_OK) return -1;
  }
  if (ckv_seal(engine, *sequence) != CKV_OK) return -1;
  return ckv_attach(engine, *sequence);
}

static int Decode(ckv_engine* engine, const caller_model* model, ckv_sequence* sequence,
                  float* outputs) {
  const size_t kv_row = (size_t)model->kv_heads * model->head_dim;
  const size_t query_row = (size_t)model->query_heads * model->head_dim;
  uint32_t step, layer;
  for (step = 0; step < model->steps; ++step) {
    for (layer = 0; layer < model->layers; ++layer) {
      ckv_append_entry append;
      ckv_step_entry entry;
      memset(&append, 0, sizeof(append));
      append.sequence = sequence;
      append.key = model->keys[layer] + (model->prompt_tokens + step) * kv_row;
      append.value = model->values[layer] + (model->prompt_tokens + step) * kv_row;
      if (ckv_append(engine, layer, &append, 1, NULL) != CKV_OK) return -1;
      memset(&entry, 0, sizeof(entry));
      entry.sequence = sequence;
      entry.queries = model->queries[layer] + step * query_row;
      entry.output = outputs + (step * model->layers + layer) * query_row;
      if (ckv_step(engine, layer, &entry, 1, NULL) != CKV_OK || entry.error != CKV_OK) return -1;
    }
  }
  return 0;
}

/* On host memory there are no groups, and a sequence decodes as if none had been asked for. */
static int IsRefusedAGroup(ckv_engine* engine, ckv_sequence* sequence) {
  return ckv_join(engine, &sequence, 1) == CKV_UNAVAILABLE &&
         strstr(ckv_error_message(), "host memory") != NULL &&
         ckv_settle(engine, sequence, NULL) == CKV_FAILED_PRECONDITION &&
         ckv_leave(engine, sequence, NULL) == CKV_FAILED_PRECONDITION;
}

int caller_run(const char* target, const caller_model* model, float* outputs, char* message,
               size_t size) {
  ckv_options options;
  ckv_engine* engine = NULL;
  ckv_sequence* sequence = NULL;
  ckv_sequence* other = NULL;
  CKV_INIT(&options);
  options.target = target;
  options.hot_cache_tokens = 64;
  if (ckv_open(&options, &engine) != CKV_OK) return Fail("open", message, size);
  if (Prefill(engine, model, &sequence) != CKV_OK) return Fail("prefill", message, size);
  if (!IsRefusedAGroup(engine, sequence)) return Fail("join", message, size);
  if (Decode(engine, model, sequence, outputs) != 0) return Fail("decode", message, size);
  if (ckv_close(engine, sequence) != CKV_OK) return Fail("close", message, size);
  if (ckv_attach_by_name(engine, model->name, &other) != CKV_OK) {
    return Fail("attach by name", message, size);
  }
  if (ckv_release(engine, other) != CKV_OK) return Fail("release", message, size);
  if (ckv_attach_by_name(engine, model->name, &other) != CKV_NOT_FOUND ||
      strcmp(ckv_error_reason(), "SEQUENCE_NOT_FOUND") != 0) {
    return Fail("attach after release", message, size);
  }
  ckv_shutdown(engine);
  return 0;
}
