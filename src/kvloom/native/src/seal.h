// Full blocks become codes, once: what cache/codec.py does, number by number and with the same bits.
#pragma once

#include <algorithm>

#include "attention.h"
#include "small.h"

namespace kvloom {

constexpr float largest_code = 127;

// Scales for numbers of at most these sizes, which come as bits: so what is no number counts as the largest.
inline f32x16 scales_of(i32x16 sizes) {
    const f32x16 scales = as_stored<bf16>(floats_of_bits(sizes) / all(largest_code));
    return scales + (scales - scales);  // infinity less infinity is no number
}

// The highest of sixteen words, sixteen times.
inline i32x16 highest_everywhere(i32x16 words) {
    std::uint32_t lane[lanes];
    store_words(lane, words);
    std::fill(lane, lane + lanes, *std::max_element(lane, lane + lanes));
    return load_words(lane);
}

inline void put_codes(std::int8_t* to, f32x16 numbers, f32x16 scales, int count) {
    float codes[lanes];
    store(codes, nearest(min(all(largest_code), max(all(-largest_code), numbers / scales))));
    // Zeros in a block of zeros, whose scale is 0, and where the scale is no number.
    for (int i = 0; i < count; ++i) to[i] = codes[i] == codes[i] ? std::int8_t(codes[i]) : std::int8_t(0);
}

// The keys of one head's block, row(token) each: a scale for each channel.
template <class Row>
void seal_keys(std::int64_t tokens, std::int64_t dim, std::int8_t* codes, bf16* scales, Row row) {
    for_each_vector(dim, [&](std::int64_t d, int count) {
        i32x16 sizes = no_sums();
        for (std::int64_t token = 0; token < tokens; ++token) sizes = max(sizes, size_bits(get(row(token) + d, count)));
        const f32x16 own = scales_of(sizes);
        put(scales + d, own, count);
        for (std::int64_t token = 0; token < tokens; ++token)
            put_codes(codes + token * dim + d, get(row(token) + d, count), own, count);
    });
}

// The values of one head's block: a scale for each token.
template <class Row>
void seal_values(std::int64_t tokens, std::int64_t dim, std::int8_t* codes, bf16* scales, Row row) {
    for (std::int64_t token = 0; token < tokens; ++token) {
        i32x16 sizes = no_sums();
        for_each_vector(dim, [&](std::int64_t d, int count) { sizes = max(sizes, size_bits(get(row(token) + d, count))); });
        const f32x16 own = scales_of(highest_everywhere(sizes));
        put(scales + token, own, 1);
        for_each_vector(dim, [&](std::int64_t d, int count) {
            put_codes(codes + token * dim + d, get(row(token) + d, count), own, count);
        });
    }
}

// Keys and values that are still numbers, [kv_heads, tokens, dim] with strides in elements from head to head.
struct Numbers {
    const void *keys, *values;
    std::int64_t key_head_stride, value_head_stride, key_dim, value_dim;
};

// One head's part of a block, whose tokens stand at the places `from`, becomes codes. `kept`: of keys and of values.
template <class Element>
void seal(const Sealed* kept, const Numbers& numbers, const std::int64_t* from, std::int64_t block, std::int64_t head) {
    const Sealed &keys = kept[0], &values = kept[1];
    const std::int64_t tokens = keys.block_tokens, slot = block * tokens;
    const auto rows_of = [&](const void* first, std::int64_t stride, std::int64_t dim) {
        return [=, rows = static_cast<const Element*>(first) + head * stride](std::int64_t i) { return rows + from[i] * dim; };
    };
    seal_keys(tokens, numbers.key_dim, keys.codes + head * keys.codes_head_stride + slot * numbers.key_dim,
              keys.scales + head * keys.scales_head_stride + block * numbers.key_dim,
              rows_of(numbers.keys, numbers.key_head_stride, numbers.key_dim));
    seal_values(tokens, numbers.value_dim, values.codes + head * values.codes_head_stride + slot * numbers.value_dim,
                values.scales + head * values.scales_head_stride + slot,
                rows_of(numbers.values, numbers.value_head_stride, numbers.value_dim));
}

}  // namespace kvloom
