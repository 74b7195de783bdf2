// A few rows are multiplied with keys and values as these are read, without packing them first: what laying a block out
// costs is more than some rows cost. Each sum has the order that it has in product.h, and so the same bits.
#pragma once

#include "pack.h"
#include "product.h"

namespace kvloom {

#if defined(__AVX512F__)

inline f32x16 words_as(__m512i words, float) { return {_mm512_castsi512_ps(words)}; }
inline bf16x32 words_as(__m512i words, bf16) { return {words}; }

// Scores [rows, 64] of queries [words, rows]: keys are transposed in registers, sixteen at a time.
template <class P, int rows>
void score_few(const P* const* keys, std::int64_t dim, const P* queries, float* scores, const Ahead& ahead) {
    constexpr std::int64_t step = 16 * depth<P>;
    for (std::int64_t d = 0; d < dim; d += step, queries += step * rows)
        for (int i = 0; i < block_positions; i += lanes) {
            __m512i words[16];
            f32x16 sums[rows];
            const auto add = [&](int c, __m512i word) KVLOOM_INLINE {
#pragma GCC unroll 8
                for (int r = 0; r < rows; ++r)
                    sums[r] = add_spread(sums[r], queries + (c * rows + r) * depth<P>, words_as(word, P()));
            };
            ahead.ask(i, lanes, d * std::int64_t(sizeof(P)));
            transpose_words(keys + i, d, (dim - d) * std::int64_t(sizeof(P)), words);
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) sums[r] = d ? load(scores + r * block_positions + i) : zeros();
            if (dim - d >= step) {
#pragma GCC unroll 16
                for (int c = 0; c < 16; ++c) add(c, words[c]);
            } else {
                alignas(64) Word last[16][lanes];
#pragma GCC unroll 16
                for (int c = 0; c < 16; ++c) _mm512_store_si512(last[c], words[c]);
#pragma GCC unroll 1
                for (int c = 0; c * depth<P> < dim - d; ++c) add(c, _mm512_load_si512(last[c]));
            }
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) store(scores + r * block_positions + i, sums[r]);
        }
}

// Queries of `rows` rows [rows, words] as score_few reads them.
template <class P> void interleave_rows(const P* queries, std::int64_t words, int rows, P* out) {
    for (std::int64_t w = 0; w < words; ++w)
        for (int r = 0; r < rows; ++r, out += depth<P>) std::memcpy(out, queries + (r * words + w) * depth<P>, sizeof(Word));
}

// 64 bytes of one row of floats, or of two neighbouring ones of bfloat16, as vectors to multiply with.
inline void lines(const float* const* rows, std::int64_t d, std::int64_t dim, f32x16* out) {
    out[0] = words_as(load_words(rows[0] + d, (dim - d) * 4), float());
}
inline void lines(const bf16* const* rows, std::int64_t d, std::int64_t dim, bf16x32* out) {
    __m512i pairs[2];
    pair_up(rows[0] + d, rows[1] + d, (dim - d) * 2, pairs);
    out[0] = words_as(pairs[0], bf16());
    out[1] = words_as(pairs[1], bf16());
}

// Adds weights [rows, 64] times values to sums [rows, columns], one line of columns after the other. Zeros may be added to 16
// columns behind the last one.
template <class P, int rows>
void add_few(const P* const* values, std::int64_t dim, const P* weights, float* sums, std::int64_t sums_stride,
             const float* factors, const Ahead& ahead) {
    constexpr int vectors = depth<P>;
    for (std::int64_t d = 0; d < dim; d += vectors * lanes, sums += vectors * lanes) {
        f32x16 own[rows][vectors];
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
            for (int v = 0; v < vectors; ++v) own[r][v] = load(sums + r * sums_stride + v * lanes) * all(factors[r]);
        for (int position = 0; position < block_positions; position += depth<P>) {
            decltype(spread(weights)) taken[vectors];
            ahead.ask(position, depth<P>, d * std::int64_t(sizeof(P)));
            lines(values + position, d, dim, taken);
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) {
                const auto weight = spread(weights + r * block_positions + position);
#pragma GCC unroll 2
                for (int v = 0; v < vectors; ++v) own[r][v] = add_product(own[r][v], weight, taken[v]);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
            for (int v = 0; v < vectors; ++v) store(sums + r * sums_stride + v * lanes, own[r][v]);
    }
}

#endif

}  // namespace kvloom
