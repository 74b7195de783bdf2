// Sixteen floats at a time, on whatever vector registers the target has.
//
// Kernels are written once, over f32x16: one register with AVX512, two with AVX2, four elsewhere. Lanes
// never mix except in sum() and highest(), whose order is fixed, so a kernel's result does not depend on how many
// rows or threads run it. Between targets results differ: where there is no fused multiply-add, fma() rounds twice.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#endif

#define KVLOOM_EXPORT extern "C" __attribute__((visibility("default")))

#define KVLOOM_INLINE __attribute__((always_inline))

namespace kvloom {

// As tensors hold them; arithmetic is on floats.
struct bf16 { std::uint16_t bits; };
struct f16 { std::uint16_t bits; };

#if defined(__F16C__)
constexpr bool has_f16 = true;
#else
constexpr bool has_f16 = false;
#endif

constexpr int lanes = 16;

inline float float_of_bits(std::uint32_t bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline std::uint32_t bits_of_float(float x) { std::uint32_t bits; std::memcpy(&bits, &x, 4); return bits; }

inline float to_float(float x) { return x; }
inline float to_float(std::int8_t x) { return float(x); }
inline float to_float(bf16 x) { return float_of_bits(std::uint32_t(x.bits) << 16); }

// To the nearest, ties to even; NaN to a quiet NaN: what PyTorch does.
inline void from_float(float x, float& result) { result = x; }
inline void from_float(float x, bf16& result) {
    const std::uint32_t bits = bits_of_float(x);
    result.bits = x != x ? 0x7fc0 : std::uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
#if defined(__F16C__)
inline float to_float(f16 x) { return _cvtsh_ss(x.bits); }
inline void from_float(float x, f16& result) { result.bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
#else
inline float to_float(f16) { return 0; }  // never called: has_f16 is false
inline void from_float(float, f16& result) { result.bits = 0; }
#endif

template <class Element> inline float rounded(float x) { Element e; from_float(x, e); return to_float(e); }

}  // namespace kvloom

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include "simd_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__)
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif

namespace kvloom {

// f(0), f(1) ... f(count - 1), with numbers that the compiler knows early enough to keep arrays of vectors in registers.
template <int... Index, class Function>
KVLOOM_INLINE inline void call_each(std::integer_sequence<int, Index...>, const Function& f) {
    (f(std::integral_constant<int, Index>{}), ...);
}
template <int count, class Function> KVLOOM_INLINE inline void unrolled(const Function& f) {
    call_each(std::make_integer_sequence<int, count>{}, f);
}

// acc[i] + a[2i] * b[2i] + a[2i + 1] * b[2i + 1]. The CPU's own instruction takes denormals as zeros.
inline f32x16 dot_pairs(f32x16 acc, bf16x32 a, bf16x32 b) {
#if defined(KVLOOM_DOT_BF16)
    return {_mm512_dpbf16_ps(acc.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
#else
    return fma(second(a), second(b), fma(first(a), first(b), acc));
#endif
}

// The first `count` of sixteen elements; zeros behind them. Nothing beyond them is read or written.
template <class Element> inline f32x16 load(const Element* p, int count) {
    Element whole[lanes] = {};
    std::memcpy(whole, p, sizeof(Element) * count);
    return load(whole);
}
template <class Element> inline void store(Element* p, f32x16 x, int count) {
    Element whole[lanes];
    store(whole, x);
    std::memcpy(p, whole, sizeof(Element) * count);
}

#if !defined(__AVX512F__)
// Lane i is the highest lane of x[i], of numbers that are not negative; sixteen vectors.
inline i32x16 highest_of_each(const i32x16* x) {
    std::uint32_t highest[lanes];
    for (int i = 0; i < lanes; ++i) {
        std::uint32_t lane[lanes];
        std::memcpy(lane, x + i, sizeof lane);
        highest[i] = 0;
        for (const std::uint32_t own : lane) highest[i] = own > highest[i] ? own : highest[i];
    }
    return load_words(highest);
}
#endif

// e ** x, within 2 units in the last place; an exact zero below -87.33, so also for minus infinity. NaN stays NaN.
// x = n ln 2 + r with |r| <= ln 2 / 2, and e ** r by its Taylor polynomial of degree 7.
inline f32x16 exp(f32x16 x) {
    const f32x16 bounded = min(all(89.0f), max(all(-87.33f), x));
    const f32x16 n = nearest(bounded * all(1.44269504f));
    const f32x16 r = fma(n, all(2.12194440e-4f), fma(n, all(-0.693359375f), bounded));
    f32x16 p = all(1.0f / 5040);
    p = fma(p, r, all(1.0f / 720));
    p = fma(p, r, all(1.0f / 120));
    p = fma(p, r, all(1.0f / 24));
    p = fma(p, r, all(1.0f / 6));
    p = fma(p, r, all(0.5f));
    p = fma(p, r, all(1.0f));
    p = fma(p, r, all(1.0f));
    return where_not_less(x, all(-87.33f), scaled(p, n));
}

}  // namespace kvloom
