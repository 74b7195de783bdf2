// What attention of a step's new tokens in one layer reads and writes.
#pragma once

#include <cstdint>

#include "pack.h"
#include "schedule.h"
#include "simd.h"
#include "turn.h"

namespace kvloom {

// Keys, or values, that are 8-bit codes. Strides are in elements.
struct Sealed {
    std::int8_t* codes;        // [kv_heads, slots, dim]
    std::int64_t codes_head_stride;
    bf16* scales;              // [kv_heads, blocks, dim], or [kv_heads, slots]
    std::int64_t scales_head_stride;
    std::int64_t block_tokens; // 0 if each slot has a scale of its own
};

// The least and the largest value of each channel over the keys of full blocks of the cache: [2, kv_heads, blocks, key_dim].
struct Bounds {
    void* numbers;
    std::int64_t blocks, block_tokens;
};

// What is wanted to be known of the attention that some new tokens give: see observe.h. Layouts are those of ctypes structures
// in attention/observation.py.
struct HeldRun { std::int64_t first, count, place; };  // positions, and where the mass of the first one goes
struct ObservedSource { std::int64_t first_row, end_row, first_run, runs; };
struct Observed {
    const ObservedSource* sources;  // ascending by row
    const HeldRun* runs;            // of each source ascending
    float* masses;
    std::int64_t count;             // of sources
};

// Of a row's scores in one head: their maximum, times log2 e, and one over the sum of the weights to which it is taken.
struct Peak { float top, share; };

struct Shape {
    std::int64_t kv_heads, group, key_dim, value_dim;  // group: query heads that share a key head
    std::int64_t columns() const { return rounded_up(value_dim, lanes); }
    std::int64_t record() const { return columns() + lanes; }  // a row's sums, its maximum, its sum of weights
};

struct Layer {
    Schedule schedule;
    Shape shape;
    const void *queries, *keys, *values;  // keys and values of native strides
    std::int64_t query_token_stride, query_head_stride, key_head_stride, value_head_stride;  // in elements
    const Sealed *sealed_keys, *sealed_values;  // of the other strides; null if there are none
    const float* sinks;
    const Turn* turn;  // null if queries do not turn with their positions
    const Bounds* bounds;  // null if no token chooses what it reads
    void* out;
    float scale, softcap;
    Peak* peaks = nullptr;           // [rows, heads], written where it is not null
    std::int32_t* chosen = nullptr;  // slots, [kv_heads, blocks chosen by all choices, 64]

    std::int32_t* chosen_slots(std::int64_t head, std::int64_t block) const {
        return chosen + (head * schedule.header->chosen + block) * block_positions;
    }
    const std::int32_t* slots_of(const Stride& stride, std::int64_t head) const {
        if (stride.slots < 0) return chosen_slots(head, ~stride.slots);
        return schedule.slots + std::int64_t(stride.slots) * block_positions;
    }
};

}  // namespace kvloom

// Attention of a step's new tokens in one layer. `element`: 0 float32, 1 bfloat16, 2 float16. `queries` [tokens, kv_heads *
// group, key_dim] with strides in elements, `keys` and `values` [kv_heads, slots, dim] with a stride from head to head, `out`
// [tokens, kv_heads * group, value_dim]. `sealed`: where blocks are sealed, the codes of keys and of values, and `keys` and
// `values` hold the step's own blocks. `sinks`: one score for each query head, or null. `turn`: null if queries do not turn.
// `bounds`: null if no token chooses. `observed`: null if nobody wants to know; masses are added to what is there.
// `softcap`: 0 if there is none.
// `memory` is aligned to 64 bytes.
KVLOOM_EXPORT void kvloom_attend(
    int element, const std::int32_t* schedule, std::int64_t kv_heads, std::int64_t group, std::int64_t key_dim,
    std::int64_t value_dim, const void* queries, std::int64_t query_token_stride, std::int64_t query_head_stride,
    const void* keys, std::int64_t key_head_stride, const void* values, std::int64_t value_head_stride,
    const kvloom::Sealed* sealed, const float* sinks, const kvloom::Turn* turn, const kvloom::Bounds* bounds,
    const kvloom::Observed* observed, float scale, float softcap, void* out, void* memory, int threads);
