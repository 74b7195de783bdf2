// Slots of a store, written, gathered, copied and sealed.

#include <cstdint>
#include <cstring>

#include "seal.h"

using namespace kvloom;

namespace {

// Layouts are those of ctypes structures in rows.py.

struct Slots {  // [heads, slots, dim], in bytes
    char* data;
    std::int64_t heads, head_stride, slot_bytes;
};

struct Copy {
    std::int64_t source, target, count;  // slots
};

template <class E> void write(
    E* store, std::int64_t store_head_stride, const E* rows, std::int64_t head_stride, std::int64_t token_stride,
    const std::int64_t* slots, std::int64_t tokens, std::int64_t heads, std::int64_t dim) {
    for (std::int64_t head = 0; head < heads; ++head)
        for (std::int64_t token = 0; token < tokens; ++token)
            std::memcpy(store + head * store_head_stride + slots[token] * dim, rows + head * head_stride + token * token_stride, std::size_t(dim) * sizeof(E));
}

}  // namespace

// Carries out all copies in all tensors. No target is another copy's source.
KVLOOM_EXPORT void kvloom_copy_slots(const Slots* tensors, std::int64_t tensor_count, const Copy* copies,
                                     std::int64_t copy_count, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (tensor_count * copy_count > 16)
    for (std::int64_t i = 0; i < tensor_count; ++i) {
        const Slots& own = tensors[i];
        for (std::int64_t head = 0; head < own.heads; ++head)
            for (const Copy* copy = copies; copy < copies + copy_count; ++copy)
                std::memcpy(own.data + head * own.head_stride + copy->target * own.slot_bytes,
                            own.data + head * own.head_stride + copy->source * own.slot_bytes,
                            std::size_t(copy->count * own.slot_bytes));
    }
}

// Slots of a store [heads, slots], by their index [rows, tokens], side by side: [rows, heads, tokens]. Slots that follow each
// other are copied at once. Strides and sizes are in bytes.
KVLOOM_EXPORT void kvloom_gather(const char* store, std::int64_t head_stride, std::int64_t heads, std::int64_t slot_bytes,
                                 const std::int64_t* slots, std::int64_t rows, std::int64_t tokens, char* out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * heads * tokens * slot_bytes > 1 << 16)
    for (std::int64_t i = 0; i < rows * heads; ++i) {
        const std::int64_t *slot = slots + i / heads * tokens, *end = slot + tokens;
        const char* own = store + i % heads * head_stride;
        for (char* to = out + i * tokens * slot_bytes; slot < end;) {
            std::int64_t run = 1;
            while (slot + run < end && slot[run] == *slot + run) ++run;
            std::memcpy(to, own + *slot * slot_bytes, std::size_t(run * slot_bytes));
            slot += run;
            to += run * slot_bytes;
        }
    }
}

// New rows [heads, tokens, dim], with strides in elements, into their slots of a store [heads, slots, dim].
KVLOOM_EXPORT void kvloom_write(
    int bytes, void* store, std::int64_t store_head_stride, const void* rows, std::int64_t head_stride, std::int64_t token_stride,
    const std::int64_t* slots, std::int64_t tokens, std::int64_t heads, std::int64_t dim) {
    if (bytes == 4) write(static_cast<float*>(store), store_head_stride, static_cast<const float*>(rows), head_stride, token_stride, slots, tokens, heads, dim);
    else write(static_cast<bf16*>(store), store_head_stride, static_cast<const bf16*>(rows), head_stride, token_stride, slots, tokens, heads, dim);
}

// Blocks become codes: their tokens stand at the places `from`, [blocks, tokens of a block], among `numbers`. `kept`: the codes
// and scales of keys and of values.
KVLOOM_EXPORT void kvloom_seal(int dtype, const Sealed* kept, const Numbers* numbers, std::int64_t kv_heads,
                               const std::int64_t* blocks, const std::int64_t* from, std::int64_t count, int threads) {
    with_type(dtype, [&](auto* type) {
        using Element = std::remove_pointer_t<decltype(type)>;
#pragma omp parallel for schedule(static) num_threads(threads) if (count * kv_heads > 16)
        for (std::int64_t i = 0; i < count * kv_heads; ++i)
            seal<Element>(kept, *numbers, from + i / kv_heads * kept->block_tokens, blocks[i / kv_heads], i % kv_heads);
    });
}
