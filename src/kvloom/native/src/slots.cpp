// Slots of a store, copied within each of its tensors.

#include <cstdint>
#include <cstring>

#include "simd.h"

namespace {

// Layouts are those of ctypes structures in rows.py.

struct Slots {  // [heads, slots, dim], in bytes
    char* data;
    std::int64_t heads, head_stride, slot_bytes;
};

struct Copy {
    std::int64_t source, target, count;  // slots
};

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
