// Keys and values of one block, laid out so that one instruction takes sixteen columns of them.
//
// A word is what one lane multiplies at a time: a float, or two neighbouring bfloat16 numbers of the summed dimension.
// Keys are summed over their dimension:  [dim in words][64 positions].
// Values are summed over positions:      [64 positions in words][dim, a multiple of 16].
#pragma once

#include <cstdint>
#include <cstring>

#include "schedule.h"
#include "simd.h"

namespace kvloom {

using Word = std::uint32_t;

template <class P> constexpr int depth = sizeof(Word) / sizeof(P);  // numbers in a word

inline std::int64_t rounded_up(std::int64_t x, std::int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

#if defined(__AVX512F__)

inline __m512i load_words(const void* row, std::int64_t bytes) {
    return bytes >= 64 ? _mm512_loadu_si512(row) : _mm512_maskz_loadu_epi8((__mmask64(1) << bytes) - 1, row);
}

// Sixteen rows of up to sixteen words (`bytes` of each are there, zeros follow): out[c] is word c of each.
template <class P>
KVLOOM_INLINE inline void transpose_words(const P* const* rows, std::int64_t offset, std::int64_t bytes, __m512i* out) {
    __m512i a[16], b[16];
    const __mmask64 there = bytes >= 64 ? ~__mmask64() : (__mmask64(1) << bytes) - 1;
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) a[i] = _mm512_maskz_loadu_epi8(there, rows[i] + offset);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    // a[4 q + c] holds the words c, c + 4, c + 8 and c + 12 of the rows 4 q to 4 q + 3.
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        const __m512i low = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x44), high = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x44);
        const __m512i low2 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xee), high2 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xee);
        out[c] = _mm512_shuffle_i32x4(low, high, 0x88);
        out[c + 4] = _mm512_shuffle_i32x4(low, high, 0xdd);
        out[c + 8] = _mm512_shuffle_i32x4(low2, high2, 0x88);
        out[c + 12] = _mm512_shuffle_i32x4(low2, high2, 0xdd);
    }
}
template <class P>
inline void transpose_words(const P* const* rows, std::int64_t offset, std::int64_t bytes, Word* out, std::int64_t stride) {
    __m512i words[16];
    transpose_words(rows, offset, bytes, words);
#pragma GCC unroll 16
    for (int c = 0; c < 16; ++c)
        if (c * 4 < bytes) _mm512_storeu_si512(out + c * stride, words[c]);
}

// Of two rows the pairs of up to 32 numbers: out[0] has the first sixteen, out[1] the others.
inline void pair_up(const bf16* first, const bf16* second, std::int64_t bytes, __m512i* out) {
    alignas(64) static constexpr std::uint16_t order[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                            8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(order), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const __m512i a = load_words(first, bytes), b = load_words(second, bytes);
    out[0] = _mm512_permutex2var_epi16(a, low, b);
    out[1] = _mm512_permutex2var_epi16(a, high, b);
}
inline void pair_up(const bf16* first, const bf16* second, std::int64_t bytes, Word* out) {
    __m512i pairs[2];
    pair_up(first, second, bytes, pairs);
    _mm512_storeu_si512(out, pairs[0]);
    if (bytes > 32) _mm512_storeu_si512(out + 16, pairs[1]);
}

// Of four rows the words of four neighbouring codes, up to 64: out[v] has those of the columns 16 v to 16 v + 15.
KVLOOM_INLINE inline void interleave(const std::int8_t* const* rows, std::int64_t offset, std::int64_t bytes, i32x16* out) {
    // Interleaving goes by quarters of a register, so what belongs into one vector is brought into one place of each first.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i a[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) a[i] = _mm512_permutexvar_epi32(order, load_words(rows[i] + offset, bytes));
    const __m512i low = _mm512_unpacklo_epi8(a[0], a[1]), high = _mm512_unpackhi_epi8(a[0], a[1]);
    const __m512i low2 = _mm512_unpacklo_epi8(a[2], a[3]), high2 = _mm512_unpackhi_epi8(a[2], a[3]);
    out[0] = {_mm512_unpacklo_epi16(low, low2)};
    out[1] = {_mm512_unpackhi_epi16(low, low2)};
    out[2] = {_mm512_unpacklo_epi16(high, high2)};
    out[3] = {_mm512_unpackhi_epi16(high, high2)};
}

#else

inline void interleave(const std::int8_t* const* rows, std::int64_t offset, std::int64_t bytes, i32x16* out) {
    std::int8_t codes[4 * lanes][4] = {};
    for (std::int64_t c = 0; c < 4 * lanes && c < bytes; ++c)
        for (int i = 0; i < 4; ++i) codes[c][i] = rows[i][offset + c];
    std::memcpy(out, codes, sizeof codes);
}

template <class P>
inline void transpose_words(const P* const* rows, std::int64_t offset, std::int64_t bytes, Word* out, std::int64_t stride) {
    for (int i = 0; i < 16; ++i) {
        Word words[16] = {};
        std::memcpy(words, rows[i] + offset, std::size_t(bytes < 64 ? bytes : 64));
        for (std::int64_t c = 0; c < 16 && c * 4 < bytes; ++c) out[c * stride + i] = words[c];
    }
}

inline void pair_up(const bf16* first, const bf16* second, std::int64_t bytes, Word* out) {
    bf16 a[32] = {}, b[32] = {};
    std::memcpy(a, first, std::size_t(bytes < 64 ? bytes : 64));
    std::memcpy(b, second, std::size_t(bytes < 64 ? bytes : 64));
    for (int i = 0; i < (bytes > 32 ? 32 : 16); ++i) {
        const bf16 pair[2] = {a[i], b[i]};
        std::memcpy(out + i, pair, sizeof pair);
    }
}

#endif

// Where the rows of 64 slots lie that are read next, or null: they are asked for while this block's are read. One core alone
// does not reach the memory's bandwidth otherwise.
struct Ahead {
    const char* const* rows = nullptr;

    // From some rows the line that begins behind so many bytes. Inline: GCC 12 takes a function that does no more than ask for
    // one without effect, and leaves out its calls.
    KVLOOM_INLINE void ask(int first, int count, std::int64_t bytes) const {
        if (!rows) return;
        for (int i = first; i < first + count; ++i) __builtin_prefetch(rows[i] + bytes, 0, 3);
    }
};

// 64 rows of keys.
template <class P> inline void pack_keys(const P* const* rows, std::int64_t dim, Word* out, const Ahead& ahead) {
    constexpr std::int64_t step = 16 * depth<P>;
    for (std::int64_t d = 0; d < dim; d += step, out += 16 * block_positions)
        for (int i = 0; i < block_positions; i += 16) {
            ahead.ask(i, 16, d * std::int64_t(sizeof(P)));
            transpose_words(rows + i, d, (dim - d) * std::int64_t(sizeof(P)), out + i, block_positions);
        }
}

// 64 rows of values.
inline void pack_values(const bf16* const* rows, std::int64_t dim, Word* out, const Ahead& ahead) {
    for (int i = 0; i < block_positions; i += 2, out += rounded_up(dim, lanes))
        for (std::int64_t d = 0; d < dim; d += 32) {
            ahead.ask(i, 2, d * 2);
            pair_up(rows[i] + d, rows[i + 1] + d, (dim - d) * 2, out + d);
        }
}
inline void pack_values(const float* const* rows, std::int64_t dim, Word* out, const Ahead& ahead) {
    for (int i = 0; i < block_positions; ++i, out += rounded_up(dim, lanes)) {
        for (std::int64_t d = 0; d < dim; d += 16) ahead.ask(i, 1, d * 4);
        std::memcpy(out, rows[i], std::size_t(dim) * 4);
        std::memset(out + dim, 0, std::size_t(rounded_up(dim, lanes) - dim) * 4);
    }
}

}  // namespace kvloom
