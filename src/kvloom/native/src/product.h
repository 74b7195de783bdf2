// Products of a strip of rows with a packed block: the sums stay in registers. One order for each sum: ascending.
#pragma once

#include <cstdint>

#include "pack.h"
#include "simd.h"

namespace kvloom {

// What registers hold of a product: rows times vectors sums, the vectors of the right and a number of the left factor.
template <class P> constexpr int strip_vectors = vector_registers >= 32 ? 4 : 1;
template <class P> constexpr int strip_rows = vector_registers >= 32 ? 6 : vector_registers >= 8 ? 4 : 2;
template <> inline constexpr int strip_vectors<std::int16_t> = vector_registers >= 32 ? 2 : 1;
template <> inline constexpr int strip_rows<std::int16_t> = vector_registers >= 32 ? 8 : strip_rows<bf16>;

// Of a few rows none is packed for where registers suffice, see few_rows.h. More are cut into strips of nearly equal heights.
constexpr int few_rows = vector_registers >= 32 ? 8 : 0;
template <class P> constexpr int least_rows = few_rows ? 4 : 1;
template <> inline constexpr int least_rows<std::int16_t> = 1;

// What lanes multiply: floats, pairs of bfloat16, and pairs of 16-bit integers, whose sums are exact.
inline f32x16 spread(const float* number) { return all(*number); }
inline bf16x32 spread(const bf16* pair) { return all_pairs(pair); }
inline i32x16 spread(const std::int16_t* pair) { return all_words(pair); }
inline f32x16 columns(const Word* words, float) { return load(reinterpret_cast<const float*>(words)); }
inline bf16x32 columns(const Word* words, bf16) { return load_pairs(reinterpret_cast<const bf16*>(words)); }
inline i32x16 columns(const Word* words, std::int16_t) { return load_words(words); }
inline f32x16 add_product(f32x16 sum, f32x16 a, f32x16 b) { return fma(a, b, sum); }
inline f32x16 add_product(f32x16 sum, bf16x32 a, bf16x32 b) { return dot_pairs(sum, a, b); }
inline i32x16 add_product(i32x16 sum, i32x16 a, i32x16 b) { return dot_words(sum, a, b); }

// Where a number is used once, the CPU spreads it while it multiplies; GCC 12 does not say so by itself.
template <class P, class Sum, class Vector> inline Sum add_spread(Sum sum, const P* number, Vector x) {
    return add_product(sum, spread(number), x);
}
#if defined(KVLOOM_DOT_BF16)
inline f32x16 add_spread(f32x16 sum, const bf16* pair, bf16x32 x) {
    asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum.v) : "v"(x.v), "m"(*reinterpret_cast<const std::uint16_t (*)[2]>(pair)));
    return sum;
}
#if defined(__AVX512VNNI__)
inline i32x16 add_spread(i32x16 sum, const std::int16_t* pair, i32x16 x) {
    asm("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(sum.v) : "v"(x.v), "m"(*reinterpret_cast<const std::int16_t (*)[2]>(pair)));
    return sum;
}
#endif
#endif

// Left [rows, words], right [words, columns], sums [rows, columns], each with the stride of its rows.
template <class P> struct Product {
    const P* left;
    std::int64_t left_stride;
    const Word* right;
    std::int64_t right_stride;
    std::int64_t words;
    float* sums;
    std::int64_t sums_stride;
    const float* factors;  // on the sums that were there before; if null they start from zero
    const float* worth;    // of integers: what a product of one is worth in each row

    f32x16 before(int r, std::int64_t column) const {
        return factors ? load(sums + r * sums_stride + column) * all(factors[r]) : zeros();
    }
};

template <class P> struct Sums {  // of numbers: on top of those before
    using Type = f32x16;
    static Type begin(const Product<P>& product, int r, std::int64_t column) { return product.before(r, column); }
    static f32x16 end(const Product<P>&, int, std::int64_t, Type sum) { return sum; }
};
template <> struct Sums<std::int16_t> {  // of integers: by themselves, as long as they are exact
    using Type = i32x16;
    static Type begin(const Product<std::int16_t>&, int, std::int64_t) { return no_sums(); }
    static f32x16 end(const Product<std::int16_t>& product, int r, std::int64_t column, Type sum) {
        return fma(floats(sum), all(product.worth[r]), product.before(r, column));
    }
};

template <class P, int rows, int vectors> void multiply(const Product<P>& product, std::int64_t column) {
    typename Sums<P>::Type sums[rows][vectors];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sums[r][v] = Sums<P>::begin(product, r, column + v * lanes);
    const P* left = product.left;
    const Word* right = product.right + column;
    for (std::int64_t k = 0; k < product.words; ++k, left += depth<P>, right += product.right_stride) {
        decltype(columns(right, P())) taken[vectors];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) taken[v] = columns(right + v * lanes, P());
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            const auto number = spread(left + r * product.left_stride);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) sums[r][v] = add_product(sums[r][v], number, taken[v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
            const std::int64_t c = column + v * lanes;
            store(product.sums + r * product.sums_stride + c, Sums<P>::end(product, r, c, sums[r][v]));
        }
}

// For a number of rows that is only known now.
template <int most, int least = 1, class Function> inline void with_rows(int rows, const Function& function) {
    if (rows == most) function(std::integral_constant<int, most>());
    else if constexpr (most > least) with_rows<most - 1, least>(rows, function);
}

// All columns, a multiple of 16.
template <class P> void multiply(const Product<P>& product, int rows, std::int64_t columns) {
    constexpr int most = strip_vectors<P>;
    with_rows<strip_rows<P>, least_rows<P>>(rows, [&](auto r) {
        std::int64_t column = 0;
        for (; column + most * lanes <= columns; column += most * lanes) multiply<P, r, most>(product, column);
        if constexpr (most > 1)
            for (; column < columns; column += lanes) multiply<P, r, 1>(product, column);
    });
}

}  // namespace kvloom
