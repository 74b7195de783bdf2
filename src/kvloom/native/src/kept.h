// Keys and values as a store keeps them, and as arithmetic wants them.
#pragma once

#include <algorithm>
#include <cstring>

#include "attention.h"
#include "lots.h"

namespace kvloom {

// Arithmetic is on P. Rows of the store that are P are read where they lie; others are converted first.
template <class E> struct Arithmetic { using P = E; };
template <> struct Arithmetic<f16> { using P = float; };

template <class P> void copy(const P* from, std::int64_t count, P* to) { std::memcpy(to, from, std::size_t(count) * sizeof(P)); }
inline void copy(const f16* from, std::int64_t count, float* to) {
    for (std::int64_t i = 0; i < count; i += lanes) {
        const int here = int(std::min<std::int64_t>(lanes, count - i));
        store(to + i, load(from + i, here), here);
    }
}

// Keys or values of one head.
struct Kept {
    const char* rows;
    std::int64_t row_bytes;

    // Where those of 64 slots lie; `nothing` where no token is held.
    void find(const std::int32_t* slots, const char* nothing, const char** found) const {
        find_rows(rows, row_bytes, slots, nothing, found);
    }
};

// The scales of one head's codes.
struct Scales {
    const bf16* scales;
    std::int64_t dim, block_tokens;  // of keys: one for each channel of a block; of values 0: one for each slot

    std::int64_t block_of(std::int32_t slot) const { return std::uint32_t(slot) / std::uint32_t(block_tokens); }
    const bf16* of_block(std::int32_t slot) const { return scales + block_of(slot) * dim; }

    // Of 64 slots; zeros where no token is held.
    void of_slots(const std::int32_t* slots, float* out) const {
        for (int i = 0; i < block_positions; i += lanes)
            if (consecutive(slots + i)) store(out + i, load(scales + slots[i]));
            else for (int j = i; j < i + lanes; ++j) out[j] = slots[j] < 0 ? 0 : to_float(scales[slots[j]]);
    }
};

// A block of 64 positions as it lies in memory.
struct Place {
    const char *keys[block_positions], *values[block_positions];
};

template <class E> struct Head {
    Kept keys, values;                // of native strides
    Kept sealed_keys, sealed_values;  // of the others
    Scales key_scales, value_scales;

    Head(const Layer& layer, std::int64_t head)
        : keys{at<E>(layer.keys, head * layer.key_head_stride), layer.shape.key_dim * std::int64_t(sizeof(E))},
          values{at<E>(layer.values, head * layer.value_head_stride), layer.shape.value_dim * std::int64_t(sizeof(E))},
          sealed_keys{}, sealed_values{}, key_scales{}, value_scales{} {
        if (!layer.sealed_keys) return;
        const Sealed &k = *layer.sealed_keys, &v = *layer.sealed_values;
        sealed_keys = {at<std::int8_t>(k.codes, head * k.codes_head_stride), layer.shape.key_dim};
        sealed_values = {at<std::int8_t>(v.codes, head * v.codes_head_stride), layer.shape.value_dim};
        key_scales = {k.scales + head * k.scales_head_stride, layer.shape.key_dim, k.block_tokens};
        value_scales = {v.scales + head * v.scales_head_stride, layer.shape.value_dim, v.block_tokens};
    }

    void find(const std::int32_t* slots, bool native, const void* nothing, Place& place) const {
        const char* zeros = static_cast<const char*>(nothing);
        (native ? keys : sealed_keys).find(slots, zeros, place.keys);
        (native ? values : sealed_values).find(slots, zeros, place.values);
    }

private:
    template <class T> static const char* at(const void* base, std::int64_t offset) {
        return reinterpret_cast<const char*>(static_cast<const T*>(base) + offset);
    }
};

// ---- rows as numbers --------------------------------------------------------------------------------------------------

// Those of 64 slots, in `converted` where they are no P in the store. `nothing`: zeros.
template <class P> void numbers(const char* const* place, std::int64_t, const P*, P*, const P** rows) {
    for (int i = 0; i < block_positions; ++i) rows[i] = reinterpret_cast<const P*>(place[i]);
}
inline void numbers_of_f16(const char* const* place, std::int64_t dim, const float* nothing, float* converted, const float** rows) {
    for (int i = 0; i < block_positions; ++i) {
        rows[i] = nothing;
        if (place[i] == reinterpret_cast<const char*>(nothing)) continue;
        copy(reinterpret_cast<const f16*>(place[i]), dim, converted + i * dim);
        rows[i] = converted + i * dim;
    }
}

// Exact: a code has 7 bits, its scale 8.
inline void decode(const std::int8_t* codes, const bf16* scales, bool each, std::int64_t dim, float* to) {
    for (std::int64_t d = 0; d < dim; d += lanes) {
        const int here = int(std::min<std::int64_t>(lanes, dim - d));
        const f32x16 scale = each ? load(scales + d, here) : all(to_float(*scales));
        store(to + d, load(codes + d, here) * scale, here);
    }
}
inline void numbers_of_codes(const char* const* place, const std::int32_t* slots, const Scales& scales, const float* nothing,
                             float* converted, const float** rows) {
    for (int i = 0; i < block_positions; ++i) {
        rows[i] = nothing;
        if (slots[i] < 0) continue;
        const bool each = scales.block_tokens;
        decode(reinterpret_cast<const std::int8_t*>(place[i]), each ? scales.of_block(slots[i]) : scales.scales + slots[i], each,
               scales.dim, converted + i * scales.dim);
        rows[i] = converted + i * scales.dim;
    }
}

// Whether `dim` numbers are all finite: of these, and of no others, zero times each is zero.
template <class P> bool finite(const P* row, std::int64_t dim) {
    f32x16 products = zeros();
    for (std::int64_t d = 0; d < dim; d += lanes)
        products = fma(load(row + d, int(std::min<std::int64_t>(lanes, dim - d))), zeros(), products);
    return sum(products) == 0;
}

}  // namespace kvloom
