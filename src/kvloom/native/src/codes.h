// Sealed blocks: rows of 8-bit codes, which become numbers when they are read.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "pack.h"
#include "schedule.h"
#include "simd.h"

namespace kvloom {

// Keys, or values, of one layer. Strides are in elements.
struct Sealed {
    const std::int8_t* codes;  // [kv_heads, slots, dim]
    std::int64_t codes_head_stride;
    const bf16* scales;        // [kv_heads, blocks, dim], or [kv_heads, slots]
    std::int64_t scales_head_stride;
    std::int64_t block_tokens; // 0 if each slot has a scale of its own
};

// The scales of one row: one for each channel, or one for all.
struct Each {
    const bf16* scales;
    f32x16 from(std::int64_t d) const { return load(scales + d); }
    float at(std::int64_t d) const { return to_float(scales[d]); }
};
struct Same {
    float scale;
    f32x16 from(std::int64_t) const { return all(scale); }
    float at(std::int64_t) const { return scale; }
};

inline void store_two(float* to, f32x16 a, f32x16 b) {
    store(to, a);
    store(to + lanes, b);
}
inline void store_two(bf16* to, f32x16 a, f32x16 b) {
#if defined(KVLOOM_DOT_BF16)
    _mm512_storeu_si512(to, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b.v, a.v)));
#else
    store(to, a);
    store(to + lanes, b);
#endif
}

// A code times its scale is exact in a float, so it is rounded once, and alike in every lane.
template <class P, class Scales> inline void decode(const std::int8_t* codes, Scales scales, std::int64_t dim, P* to) {
    std::int64_t d = 0;
    for (; d + 2 * lanes <= dim; d += 2 * lanes)
        store_two(to + d, load(codes + d) * scales.from(d), load(codes + d + lanes) * scales.from(d + lanes));
    for (; d < dim; ++d) from_float(to_float(codes[d]) * scales.at(d), to[d]);
}

// The codes of one head.
struct Codes {
    Sealed sealed;
    std::int64_t head, dim;

    // Rows of 64 slots as they are; `nothing` where no token is held.
    void rows(const std::int32_t* slots, const std::int8_t* nothing, const std::int8_t** rows) const {
        const std::int8_t* codes = sealed.codes + head * sealed.codes_head_stride;
        for (int i = 0; i < block_positions; ++i) rows[i] = slots[i] < 0 ? nothing : codes + slots[i] * dim;
    }

    // What to ask for while a block is laid out; `next` may be null.
    Ahead ahead(const std::int32_t* next) const {
        Ahead ahead;
        const std::int8_t* codes = sealed.codes + head * sealed.codes_head_stride;
        for (int i = 0; next && i < block_positions; ++i)
            if (next[i] >= 0) ahead.rows[i] = reinterpret_cast<const char*>(codes + next[i] * dim);
        return ahead;
    }

    // The scales of 64 slots; zeros where no token is held.
    void slot_scales(const std::int32_t* slots, float* out) const {
        const bf16* scales = sealed.scales + head * sealed.scales_head_stride;
        for (int i = 0; i < block_positions; ++i) out[i] = slots[i] < 0 ? 0 : to_float(scales[slots[i]]);
    }

    // Rows of 64 slots as numbers, in `converted`; `nothing` where no token is held.
    template <class P>
    void rows(const std::int32_t* slots, P* converted, const P* nothing, const P** rows) const {
        const std::int8_t* codes = sealed.codes + head * sealed.codes_head_stride;
        const bf16* scales = sealed.scales + head * sealed.scales_head_stride;
        for (int i = 0; i < block_positions; ++i) {
            rows[i] = nothing;
            if (slots[i] < 0) continue;
            P* to = converted + i * dim;
            const std::int8_t* row = codes + slots[i] * dim;
            if (sealed.block_tokens) decode(row, Each{scales + slots[i] / sealed.block_tokens * dim}, dim, to);
            else decode(row, Same{to_float(scales[slots[i]])}, dim, to);
            rows[i] = to;
        }
    }
};

// ---- codes that are multiplied as they are ------------------------------------------------------------------------
//
// In bfloat16 a code is exact, and the scales go to the other factor: those of keys to the query, which is then rounded to
// 16-bit integers, so that a score is an exact sum of integers times one float; those of values to the weights.

// Columns of one block of 16 positions whose keys have the same scales.
struct Piece {
    int vector, first, end;  // of 16 columns
    const bf16* scales;
};

struct Pieces {
    int count = 0;
    Piece pieces[block_positions];

    void find(const Codes& codes, const std::int32_t* slots) {
        const bf16* scales = codes.sealed.scales + codes.head * codes.sealed.scales_head_stride;
        count = 0;
        for (int i = 0; i < block_positions; ++i) {
            if (slots[i] < 0) continue;
            const bf16* own = scales + slots[i] / codes.sealed.block_tokens * codes.dim;
            Piece* last = count ? pieces + count - 1 : nullptr;
            if (last && last->vector == i / lanes && last->scales == own) last->end = i % lanes + 1;
            else pieces[count++] = {i / lanes, i % lanes, i % lanes + 1, own};
        }
    }
};

inline std::int64_t code_words(std::int64_t dim) { return (dim + 3) / 4; }

// A query times the scales of some keys as 16-bit integers: of each four numbers the first, third, second and fourth, as
// even_codes and odd_codes take them. Returns what one is worth; NaN if anything is no number.
inline float quantize(const bf16* query, const bf16* scales, std::int64_t dim, float* room, std::int16_t* out) {
    const std::int64_t padded = code_words(dim) * 4;
    f32x16 top = zeros(), wrong = zeros();
    for (std::int64_t d = 0; d < padded; d += lanes) {
        const int here = int(std::min<std::int64_t>(lanes, dim - d));
        const f32x16 x = here == lanes ? load(query + d) * load(scales + d) : load(query + d, here) * load(scales + d, here);
        store(room + d, x);
        top = max(top, max(x, zeros() - x));
        wrong = wrong + (x - x);
    }
    // The largest sum of products stays below 2 ** 31.
    const float most = std::min(32767.0f, std::floor(2147483520.0f / (127.0f * float(padded))));
    const float largest = highest(top), each = largest / most;
    const f32x16 factor = all(largest > 0 ? most / largest : 0.0f);
#if defined(__AVX512F__)
    for (std::int64_t d = 0; d < padded; d += lanes) {
        const __m512i x = _mm512_cvtps_epi32((load(room + d) * factor).v);
        const __m512i third = _mm512_slli_epi32(_mm512_shuffle_epi32(x, _MM_PERM_DCDC), 16);
        const __m512i words = _mm512_or_si512(_mm512_and_si512(x, _mm512_set1_epi32(0xffff)), third);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + d), _mm512_castsi512_si256(_mm512_maskz_compress_epi32(0x3333, words)));
    }
#else
    for (std::int64_t d = 0; d < padded; d += lanes) store(room + d, nearest(load(room + d) * factor));
    for (std::int64_t d = 0; d < padded; d += 4)
        for (int i = 0; i < 4; ++i) out[d + i] = std::int16_t(room[d + (i == 1 ? 2 : i == 2 ? 1 : i)]);
#endif
    return each + sum(wrong);
}

// 64 rows of codes, transposed: [words of four codes][64 positions].
inline void pack_codes(const std::int8_t* const* rows, std::int64_t dim, Word* out, const Ahead& ahead) {
    for (std::int64_t d = 0; d < dim; d += 64, out += 16 * block_positions)
        for (int i = 0; i < block_positions; i += 16) {
            ahead.ask(i, 16, d);
            transpose_words(rows + i, d, dim - d, out + i, block_positions);
        }
}

// 64 rows of codes as the bfloat16 pairs of pack_values.
inline void pack_code_pairs(const std::int8_t* const* rows, std::int64_t dim, Word* out, const Ahead& ahead) {
    for (int i = 0; i < block_positions; i += 2)
        for (std::int64_t d = 0; d < dim; d += lanes, out += lanes) {
            if (d % 64 == 0) ahead.ask(i, 2, d);
            const int here = int(std::min<std::int64_t>(lanes, dim - d));
            const f32x16 a = here == lanes ? load(rows[i] + d) : load(rows[i] + d, here);
            const f32x16 b = here == lanes ? load(rows[i + 1] + d) : load(rows[i + 1] + d, here);
#if defined(__AVX512F__)
            // A code has 7 bits, so the lower half of its float is zero.
            const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(a.v), 16);
            _mm512_storeu_si512(out, _mm512_or_si512(low, _mm512_castps_si512(b.v)));
#else
            float first[lanes], second[lanes];
            store(first, a);
            store(second, b);
            for (int lane = 0; lane < lanes; ++lane) {
                bf16 pair[2];
                from_float(first[lane], pair[0]);
                from_float(second[lane], pair[1]);
                std::memcpy(out + lane, pair, sizeof pair);
            }
#endif
        }
}

constexpr int pieces_at_once = 4;

// Scores of some rows and up to four pieces. `queries` [rows, four, padded dim] with what one of them is worth.
template <int rows>
void score(const Word* codes, std::int64_t words, const std::int16_t* queries, const float* worth, const Piece* pieces,
           int count, float* scores) {
    i32x16 sums[rows][pieces_at_once];
    const Word* columns[pieces_at_once];
#pragma GCC unroll 4
    for (int p = 0; p < pieces_at_once; ++p) {
        columns[p] = codes + pieces[p < count ? p : 0].vector * lanes;
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) sums[r][p] = no_sums();
    }
    for (std::int64_t k = 0; k < words; ++k)
#pragma GCC unroll 4
        for (int p = 0; p < pieces_at_once; ++p) {
            const i32x16 four = load_words(columns[p] + k * block_positions);
            const i32x16 even = even_codes(four), odd = odd_codes(four);
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) {
                const std::int16_t* query = queries + ((r * pieces_at_once + p) * words + k) * 4;
                sums[r][p] = dot_words(dot_words(sums[r][p], even, all_words(query)), odd, all_words(query + 2));
            }
        }
    for (int r = 0; r < rows; ++r)
        for (int p = 0; p < count; ++p) {
            float lane[lanes];
            store(lane, floats(sums[r][p]) * all(worth[r * pieces_at_once + p]));
            std::copy(lane + pieces[p].first, lane + pieces[p].end, scores + r * block_positions + pieces[p].vector * lanes + pieces[p].first);
        }
}

template <int most_rows>
void score(int rows, const Word* codes, std::int64_t words, const std::int16_t* queries, const float* worth,
           const Piece* pieces, int count, float* scores) {
    if (rows == most_rows) score<most_rows>(codes, words, queries, worth, pieces, count, scores);
    else if constexpr (most_rows > 1) score<most_rows - 1>(rows, codes, words, queries, worth, pieces, count, scores);
}

}  // namespace kvloom
