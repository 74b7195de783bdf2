// Codes that are multiplied as they are.
//
// A code is an 8-bit integer, and its scale goes to the other factor: those of keys to the query, those of values to the
// weights. What results is rounded to 16-bit integers of which the largest is about 32767, so that a sum of products is exact,
// in whatever order, and one float says what it is worth.
#pragma once

#include <algorithm>
#include <cmath>

#include "kept.h"
#include "pack.h"
#include "simd.h"

namespace kvloom {

// Between the rows of a few, see below: a number that the compiler knows keeps their addresses apart without a register for each.
constexpr std::int64_t few_stride = 256;

// Numbers are filled up with zeros to a multiple of it.
constexpr int integers_at_once = 2 * lanes;
constexpr int pieces_at_once = 4;

// Columns of one block of 16 positions whose keys have the same scales.
struct Piece {
    int vector, first, end;  // of 16 columns
    const bf16* scales;
};

struct Pieces {
    int count = 0;
    Piece pieces[block_positions];

    void find(const Scales& scales, const std::int32_t* slots) {
        count = 0;
        for (int vector = 0; vector < block_positions / lanes; ++vector, slots += lanes) {
            if (consecutive(slots) && scales.block_of(slots[0]) == scales.block_of(slots[lanes - 1])) {
                pieces[count++] = {vector, 0, lanes, scales.of_block(slots[0])};
                continue;
            }
            const int before = count;
            for (int i = 0; i < lanes; ++i) {
                if (slots[i] < 0) continue;
                const bf16* own = scales.of_block(slots[i]);
                if (count > before && pieces[count - 1].scales == own) pieces[count - 1].end = i + 1;
                else pieces[count++] = {vector, i, i + 1, own};
            }
        }
    }

    // Whether each of the four vectors is one piece.
    bool are_vectors() const { return count == block_positions / lanes && pieces[0].vector == 0 && pieces[count - 1].vector == count - 1; }

    // Whether no other piece has columns of the same vector.
    bool is_alone(int index) const {
        const int vector = pieces[index].vector;
        return (!index || pieces[index - 1].vector < vector) && (index + 1 == count || pieces[index + 1].vector > vector);
    }
};

// Rows of `columns` numbers, row(i)(column) and those behind it, become integers, rows `stride` apart. worth[i] says what one of row i
// is worth, and is NaN if a number is not finite. `terms`: of how many products with codes a sum must stay below 2 ** 31.
template <class Row>
void round_rows(int rows, std::int64_t columns, std::int64_t stride, std::int64_t terms, std::int16_t* integers, float* worth, Row row) {
    const f32x16 most = all(std::min(32767.0f, std::floor(2147483520.0f / (127.0f * float(terms)))));
    for (int first = 0; first < rows; first += lanes) {
        const int count = std::min(lanes, rows - first);
        i32x16 sizes[lanes] = {};
        for (int i = 0; i < count; ++i) {
            const auto number = row(first + i);
            i32x16 size = no_sums();
            for (std::int64_t c = 0; c < columns; c += lanes) size = max(size, size_bits(number(c)));
            sizes[i] = size;
        }
        const f32x16 largest = max(all(1e-30f), floats_of_bits(highest_of_each(sizes)));
        float factors[lanes];
        store(factors, most / largest);
        store(worth + first, largest / most + (largest - largest), count);  // infinity less infinity is no number
        for (int i = 0; i < count; ++i) {
            const auto number = row(first + i);
            const f32x16 factor = all(factors[i]);
            for (std::int64_t c = 0; c < columns; c += integers_at_once)
                store_integers(integers + (first + i) * stride + c, number(c) * factor, number(c + lanes) * factor);
        }
    }
}

inline void widen(const bf16* from, std::int64_t count, std::int64_t padded, float* to) {
    for (std::int64_t i = 0; i < padded; i += lanes) {
        const std::int64_t here = std::min<std::int64_t>(lanes, std::max<std::int64_t>(0, count - i));
        store(to + i, here == lanes ? load(from + i) : load(from + i, int(here)));
    }
}

// ---- layouts ----------------------------------------------------------------------------------------------------------
//
// Of four codes, of neighbouring dimensions of a key or of neighbouring values, a word has the first and third as 16-bit
// integers, the next word the second and fourth. store_integers orders the other factor alike.

inline void store_codes(Word* out, std::int64_t stride, i32x16 fours) {
    store_words(out, even_codes(fours));
    store_words(out + stride, odd_codes(fours));
}

// 64 keys: [words of two codes][64 positions].
inline void pack_key_codes(const std::int8_t* const* rows, std::int64_t dim, Word* out, const Ahead& ahead) {
    for (std::int64_t d = 0; d < dim; d += 64, out += 2 * 16 * block_positions)
        for (int i = 0; i < block_positions; i += lanes) {
            ahead.ask(i, lanes, d);
#if defined(__AVX512F__)
            __m512i words[16];
            transpose_words(rows + i, d, dim - d, words);
            unrolled<16>([&](auto c) KVLOOM_INLINE {
                if (4 * c < dim - d) store_codes(out + 2 * c * block_positions + i, block_positions, {words[c]});
            });
#else
            Word fours[16][lanes];
            transpose_words(rows + i, d, dim - d, fours[0], lanes);
            for (int c = 0; c < 16 && 4 * c < dim - d; ++c)
                store_codes(out + 2 * c * block_positions + i, block_positions, load_words(fours[c]));
#endif
        }
}

// 64 values: [64 positions in words of two codes][dim, a multiple of 16].
inline void pack_value_codes(const std::int8_t* const* rows, std::int64_t dim, Word* out, const Ahead& ahead) {
    const std::int64_t stride = rounded_up(dim, lanes);
    for (int i = 0; i < block_positions; i += 4, out += 2 * stride)
        for (std::int64_t d = 0; d < dim; d += 64) {
            i32x16 fours[4];
            ahead.ask(i, 4, d);
            interleave(rows + i, d, dim - d, fours);
            unrolled<4>([&](auto v) KVLOOM_INLINE {
                if (v * lanes < dim - d) store_codes(out + d + v * lanes, stride, fours[v]);
            });
        }
}

#if defined(__AVX512F__)

// ---- few rows, see few_rows.h -------------------------------------------------------------------------------------------

// Scores of sixteen keys, which have the same scales: of queries [rows, few_stride].
template <int rows>
void score_few_codes(const std::int8_t* const* keys, std::int64_t dim, const std::int16_t* queries, const float* worth, float* scores) {
    i32x16 sums[rows];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) sums[r] = no_sums();
    for (std::int64_t d = 0; d < dim; d += 64, queries += 64) {
        __m512i words[16];
        transpose_words(keys, d, dim - d, words);
#pragma GCC unroll 16
        for (int c = 0; c < 16; ++c) {
            const i32x16 even = even_codes({words[c]}), odd = odd_codes({words[c]});
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) {
                const std::int16_t* query = queries + r * few_stride + 4 * c;
                sums[r] = add_spread(add_spread(sums[r], query, even), query + 2, odd);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) store(scores + r * block_positions, floats(sums[r]) * all(worth[r]));
}

// Adds weights [rows, 64] times values to some of 64 columns of the sums, from `first` vectors on.
template <int rows, int vectors, int first>
void add_few_codes(const std::int8_t* const* values, std::int64_t d, std::int64_t dim, const std::int16_t* weights, const float* worth,
                   float* sums, std::int64_t sums_stride, const float* factors, const Ahead& ahead) {
    i32x16 own[rows * vectors];
    unrolled<rows * vectors>([&](auto i) KVLOOM_INLINE { own[i] = no_sums(); });
    for (int position = 0; position < block_positions; position += 4) {
        i32x16 fours[4];
        if (!first) ahead.ask(position, 4, d);
        interleave(values + position, d, dim - d, fours);
        unrolled<vectors>([&](auto v) KVLOOM_INLINE {
            const i32x16 even = even_codes(fours[first + v]), odd = odd_codes(fours[first + v]);
            unrolled<rows>([&](auto r) KVLOOM_INLINE {
                const std::int16_t* weight = weights + r * block_positions + position;
                i32x16& sum = own[r * vectors + v];
                sum = add_spread(add_spread(sum, weight, even), weight + 2, odd);
            });
        });
    }
    unrolled<vectors>([&](auto v) KVLOOM_INLINE {
        const std::int64_t column = d + (first + v) * lanes;
        if (column < dim) unrolled<rows>([&](auto r) KVLOOM_INLINE {
            float* to = sums + r * sums_stride + column;
            store(to, fma(floats(own[r * vectors + v]), all(worth[r]), load(to) * all(factors[r])));
        });
    });
}
template <int rows>
void add_few_codes(const std::int8_t* const* values, std::int64_t dim, const std::int16_t* weights, const float* worth, float* sums,
                   std::int64_t sums_stride, const float* factors, const Ahead& ahead) {
    constexpr int vectors = rows > 4 ? 2 : 4;
    for (std::int64_t d = 0; d < dim; d += 64) {
        add_few_codes<rows, vectors, 0>(values, d, dim, weights, worth, sums, sums_stride, factors, ahead);
        if constexpr (vectors == 2)
            if (dim - d > 2 * lanes) add_few_codes<rows, 2, 2>(values, d, dim, weights, worth, sums, sums_stride, factors, ahead);
    }
}

#endif

}  // namespace kvloom
