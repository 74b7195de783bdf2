// The least and the largest value of each channel over the keys of a full block, as `Store.bounds` in cache/store/native.py has it.
#pragma once

#include "attention.h"
#include "small.h"

namespace kvloom {

// Those of one head's block of `tokens` keys, number(token, channel, count) for up to sixteen channels.
template <class Element, class Number>
void bound(const Bounds& bounds, std::int64_t heads, std::int64_t dim, std::int64_t head, std::int64_t block, Number number) {
    Element* least = static_cast<Element*>(bounds.numbers) + (head * bounds.blocks + block) * dim;
    Element* largest = least + heads * bounds.blocks * dim;
    for_each_vector(dim, [&](std::int64_t d, int count) {
        f32x16 low = number(0, d, count), high = low;
        for (std::int64_t token = 1; token < bounds.block_tokens; ++token) {
            const f32x16 own = number(token, d, count);
            low = min(low, own);
            high = max(high, own);
        }
        put(least + d, low, count);
        put(largest + d, high, count);
    });
}

// Of keys [kv_heads, slots, dim].
template <class Element>
void bound_keys(const Bounds& bounds, const void* keys, std::int64_t head_stride, std::int64_t heads, std::int64_t dim,
                std::int64_t head, std::int64_t block) {
    const Element* first = static_cast<const Element*>(keys) + head * head_stride + block * bounds.block_tokens * dim;
    bound<Element>(bounds, heads, dim, head, block,
                   [=](std::int64_t token, std::int64_t d, int count) { return get(first + token * dim + d, count); });
}

// Of codes: of the numbers that are read.
template <class Element>
void bound_codes(const Bounds& bounds, const Sealed& keys, std::int64_t heads, std::int64_t dim, std::int64_t head,
                 std::int64_t block) {
    const std::int8_t* codes = keys.codes + head * keys.codes_head_stride + block * bounds.block_tokens * dim;
    const bf16* scales = keys.scales + head * keys.scales_head_stride + block * dim;
    bound<Element>(bounds, heads, dim, head, block, [=](std::int64_t token, std::int64_t d, int count) {
        return get(codes + token * dim + d, count) * get(scales + d, count);
    });
}

}  // namespace kvloom
