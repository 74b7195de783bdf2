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

// ---- AVX512 ---------------------------------------------------------------------------------------------------

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)

#if defined(__AVX512BF16__)
#define KVLOOM_DOT_BF16 1
constexpr const char* instructions = "AVX512-BF16";
#else
constexpr const char* instructions = "AVX512";
#endif
constexpr int vector_registers = 32;  // that hold an f32x16

struct f32x16 { __m512 v; };
struct bf16x32 { __m512i v; };  // 16 pairs

inline f32x16 zeros() { return {_mm512_setzero_ps()}; }
inline f32x16 all(float x) { return {_mm512_set1_ps(x)}; }
inline f32x16 operator+(f32x16 a, f32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline f32x16 operator-(f32x16 a, f32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline f32x16 operator*(f32x16 a, f32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline f32x16 operator/(f32x16 a, f32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c
// The second where either is NaN, as everywhere below.
inline f32x16 max(f32x16 a, f32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline f32x16 min(f32x16 a, f32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }

inline f32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, f32x16 x) { _mm512_storeu_ps(p, x.v); }
inline f32x16 load(const bf16* p) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16))};
}
inline void store(bf16* p, f32x16 x) {
    const __m512i bits = _mm512_castps_si512(x.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
    up = _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(up));
}
inline f32x16 load(const f16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline void store(f16* p, f32x16 x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}

inline f32x16 load(const std::int8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}

inline bf16x32 load_pairs(const bf16* p) { return {_mm512_loadu_si512(p)}; }
inline bf16x32 all_pairs(const bf16* p) { std::int32_t pair; std::memcpy(&pair, p, 4); return {_mm512_set1_epi32(pair)}; }
inline f32x16 first(bf16x32 x) { return {_mm512_castsi512_ps(_mm512_slli_epi32(x.v, 16))}; }
inline f32x16 second(bf16x32 x) { return {_mm512_castsi512_ps(_mm512_and_si512(x.v, _mm512_set1_epi32(0xffff0000)))}; }

inline float sum(f32x16 x) { return _mm512_reduce_add_ps(x.v); }
inline float highest(f32x16 x) { return _mm512_reduce_max_ps(x.v); }

// e ** r * 2 ** n, from r's polynomial p.
inline f32x16 scaled(f32x16 p, f32x16 n) { return {_mm512_scalef_ps(p.v, n.v)}; }
inline f32x16 nearest(f32x16 x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// x, but zero where a < b.
inline f32x16 where_not_less(f32x16 a, f32x16 b, f32x16 x) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_NLT_UQ), x.v)};
}

// Sixteen 32-bit sums, and sixteen words of four 8-bit codes or of two 16-bit numbers.
struct i32x16 { __m512i v; };
inline i32x16 no_sums() { return {_mm512_setzero_si512()}; }
inline i32x16 load_words(const std::uint32_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store_words(std::uint32_t* p, i32x16 x) { _mm512_storeu_si512(p, x.v); }
inline i32x16 all_words(const std::int16_t* pair) { std::int32_t word; std::memcpy(&word, pair, 4); return {_mm512_set1_epi32(word)}; }
// Of four codes the first and third, or the second and fourth, as 16-bit numbers.
inline i32x16 even_codes(i32x16 x) { return {_mm512_srai_epi16(_mm512_slli_epi16(x.v, 8), 8)}; }
inline i32x16 odd_codes(i32x16 x) { return {_mm512_srai_epi16(x.v, 8)}; }
// sum + a[0] * b[0] + a[1] * b[1] of 16-bit numbers: exact, so the order of additions does not matter.
inline i32x16 dot_words(i32x16 sum, i32x16 a, i32x16 b) {
#if defined(__AVX512VNNI__)
    return {_mm512_dpwssd_epi32(sum.v, a.v, b.v)};
#else
    return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(a.v, b.v))};
#endif
}
inline f32x16 floats(i32x16 x) { return {_mm512_cvtepi32_ps(x.v)}; }
inline i32x16 size_bits(f32x16 x) { return {_mm512_and_si512(_mm512_castps_si512(x.v), _mm512_set1_epi32(0x7fffffff))}; }
inline i32x16 max(i32x16 a, i32x16 b) { return {_mm512_max_epi32(a.v, b.v)}; }
inline f32x16 floats_of_bits(i32x16 x) { return {_mm512_castsi512_ps(x.v)}; }
inline i32x16 highest_of_each(const i32x16* x) {
    __m512i a[16];
    for (int i = 0; i < 8; ++i)
        a[i] = _mm512_max_epi32(_mm512_unpacklo_epi32(x[2 * i].v, x[2 * i + 1].v), _mm512_unpackhi_epi32(x[2 * i].v, x[2 * i + 1].v));
    for (int i = 0; i < 4; ++i)
        a[i] = _mm512_max_epi32(_mm512_unpacklo_epi64(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_epi64(a[2 * i], a[2 * i + 1]));
    // a[i] has in each quarter the vectors 4 i to 4 i + 3.
    const __m512i low = _mm512_max_epi32(_mm512_shuffle_i32x4(a[0], a[1], 0x44), _mm512_shuffle_i32x4(a[0], a[1], 0xee));
    const __m512i high = _mm512_max_epi32(_mm512_shuffle_i32x4(a[2], a[3], 0x44), _mm512_shuffle_i32x4(a[2], a[3], 0xee));
    return {_mm512_max_epi32(_mm512_shuffle_i32x4(low, high, 0x88), _mm512_shuffle_i32x4(low, high, 0xdd))};
}
// 32 floats as 16-bit integers, of each four the first, third, second and fourth.
inline void store_integers(std::int16_t* to, f32x16 a, f32x16 b) {
    const __m512i mixed = _mm512_packs_epi32(_mm512_cvtps_epi32(a.v), _mm512_cvtps_epi32(b.v));
    const __m512i turned = _mm512_shuffle_epi8(mixed, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15)));
    _mm512_storeu_si512(to, _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), turned));
}

// ---- AVX2 -----------------------------------------------------------------------------------------------------

#elif defined(__AVX2__) && defined(__FMA__)

constexpr const char* instructions = "AVX2";
constexpr int vector_registers = 8;

struct f32x16 { __m256 low, high; };
struct bf16x32 { __m256i low, high; };

inline f32x16 zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline f32x16 all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline f32x16 operator+(f32x16 a, f32x16 b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline f32x16 operator-(f32x16 a, f32x16 b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline f32x16 operator*(f32x16 a, f32x16 b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline f32x16 operator/(f32x16 a, f32x16 b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline f32x16 max(f32x16 a, f32x16 b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline f32x16 min(f32x16 a, f32x16 b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }

inline f32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, f32x16 x) { _mm256_storeu_ps(p, x.low); _mm256_storeu_ps(p + 8, x.high); }

inline __m256 half_of(const bf16* p) {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}
inline __m256i rounded_bits(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc0), nan);
}
inline f32x16 load(const bf16* p) { return {half_of(p), half_of(p + 8)}; }
inline void store(bf16* p, f32x16 x) {
    const __m256i mixed = _mm256_packus_epi32(rounded_bits(x.low), rounded_bits(x.high));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(mixed, 0xd8));
}
#if defined(__F16C__)
inline f32x16 load(const f16* p) {
    const __m128i* raw = reinterpret_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(raw)), _mm256_cvtph_ps(_mm_loadu_si128(raw + 1))};
}
inline void store(f16* p, f32x16 x) {
    __m128i* raw = reinterpret_cast<__m128i*>(p);
    _mm_storeu_si128(raw, _mm256_cvtps_ph(x.low, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(raw + 1, _mm256_cvtps_ph(x.high, _MM_FROUND_TO_NEAREST_INT));
}
#else
inline f32x16 load(const f16*) { return zeros(); }
inline void store(f16*, f32x16) {}
#endif

inline __m256 eight_of(const std::int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline f32x16 load(const std::int8_t* p) { return {eight_of(p), eight_of(p + 8)}; }

inline bf16x32 load_pairs(const bf16* p) {
    const __m256i* raw = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(raw), _mm256_loadu_si256(raw + 1)};
}
inline bf16x32 all_pairs(const bf16* p) {
    std::int32_t pair;
    std::memcpy(&pair, p, 4);
    return {_mm256_set1_epi32(pair), _mm256_set1_epi32(pair)};
}
inline f32x16 first(bf16x32 x) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(x.low, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(x.high, 16))};
}
inline f32x16 second(bf16x32 x) {
    const __m256i mask = _mm256_set1_epi32(0xffff0000);
    return {_mm256_castsi256_ps(_mm256_and_si256(x.low, mask)), _mm256_castsi256_ps(_mm256_and_si256(x.high, mask))};
}

inline float sum(f32x16 x) {
    const __m256 eight = _mm256_add_ps(x.low, x.high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float highest(f32x16 x) {
    const __m256 eight = _mm256_max_ps(x.low, x.high);
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

inline __m256 power_of_two(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
// 2 ** 128 is no float, so the power is applied in two halves.
inline __m256 scaled_half(__m256 p, __m256 n) {
    const __m256i all_of_it = _mm256_cvtps_epi32(n), part = _mm256_srai_epi32(all_of_it, 1);
    return _mm256_mul_ps(_mm256_mul_ps(p, power_of_two(part)), power_of_two(_mm256_sub_epi32(all_of_it, part)));
}
inline f32x16 scaled(f32x16 p, f32x16 n) { return {scaled_half(p.low, n.low), scaled_half(p.high, n.high)}; }
inline f32x16 nearest(f32x16 x) {
    return {_mm256_round_ps(x.low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
            _mm256_round_ps(x.high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline f32x16 where_not_less(f32x16 a, f32x16 b, f32x16 x) {
    return {_mm256_and_ps(_mm256_cmp_ps(a.low, b.low, _CMP_NLT_UQ), x.low),
            _mm256_and_ps(_mm256_cmp_ps(a.high, b.high, _CMP_NLT_UQ), x.high)};
}

struct i32x16 { __m256i low, high; };
inline i32x16 no_sums() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline i32x16 load_words(const std::uint32_t* p) {
    const __m256i* raw = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(raw), _mm256_loadu_si256(raw + 1)};
}
inline void store_words(std::uint32_t* p, i32x16 x) { std::memcpy(p, &x, sizeof x); }
inline i32x16 all_words(const std::int16_t* pair) {
    std::int32_t word;
    std::memcpy(&word, pair, 4);
    return {_mm256_set1_epi32(word), _mm256_set1_epi32(word)};
}
inline __m256i even_half(__m256i x) { return _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8); }
inline i32x16 even_codes(i32x16 x) { return {even_half(x.low), even_half(x.high)}; }
inline i32x16 odd_codes(i32x16 x) { return {_mm256_srai_epi16(x.low, 8), _mm256_srai_epi16(x.high, 8)}; }
inline i32x16 dot_words(i32x16 sum, i32x16 a, i32x16 b) {
    return {_mm256_add_epi32(sum.low, _mm256_madd_epi16(a.low, b.low)),
            _mm256_add_epi32(sum.high, _mm256_madd_epi16(a.high, b.high))};
}
inline f32x16 floats(i32x16 x) { return {_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)}; }
inline i32x16 size_bits(f32x16 x) {
    const __m256i mask = _mm256_set1_epi32(0x7fffffff);
    return {_mm256_and_si256(_mm256_castps_si256(x.low), mask), _mm256_and_si256(_mm256_castps_si256(x.high), mask)};
}
inline i32x16 max(i32x16 a, i32x16 b) { return {_mm256_max_epi32(a.low, b.low), _mm256_max_epi32(a.high, b.high)}; }
inline f32x16 floats_of_bits(i32x16 x) { return {_mm256_castsi256_ps(x.low), _mm256_castsi256_ps(x.high)}; }
inline __m256i integers_of(__m256 low, __m256 high) {
    const __m256i mixed = _mm256_packs_epi32(_mm256_cvtps_epi32(low), _mm256_cvtps_epi32(high));
    const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
    return _mm256_permute4x64_epi64(_mm256_shuffle_epi8(mixed, _mm256_broadcastsi128_si256(order)), 0xd8);
}
inline void store_integers(std::int16_t* to, f32x16 a, f32x16 b) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), integers_of(a.low, a.high));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + lanes), integers_of(b.low, b.high));
}

// ---- elsewhere ------------------------------------------------------------------------------------------------

#else

// Vectors of four, which GCC and Clang have on every CPU.
constexpr const char* instructions = "portable";
constexpr int vector_registers = 4;
constexpr int quads = lanes / 4;

typedef float quad __attribute__((vector_size(16)));
typedef std::int32_t int_quad __attribute__((vector_size(16)));
typedef std::uint32_t bits_quad __attribute__((vector_size(16)));
typedef std::uint16_t short_quad __attribute__((vector_size(8)));

struct f32x16 { quad v[quads]; };
struct bf16x32 { bits_quad v[quads]; };

template <class Function> inline f32x16 each(Function function) {
    f32x16 result;
    for (int i = 0; i < quads; ++i) result.v[i] = function(i);
    return result;
}
inline quad choose(int_quad mask, quad yes, quad no) { return quad((mask & int_quad(yes)) | (~mask & int_quad(no))); }
inline quad four(float x) { return quad{x, x, x, x}; }

inline f32x16 all(float x) { return each([=](int) { return four(x); }); }
inline f32x16 zeros() { return all(0); }
inline f32x16 operator+(const f32x16& a, const f32x16& b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
inline f32x16 operator-(const f32x16& a, const f32x16& b) { return each([&](int i) { return a.v[i] - b.v[i]; }); }
inline f32x16 operator*(const f32x16& a, const f32x16& b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
inline f32x16 operator/(const f32x16& a, const f32x16& b) { return each([&](int i) { return a.v[i] / b.v[i]; }); }
inline f32x16 fma(const f32x16& a, const f32x16& b, const f32x16& c) {
    return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline f32x16 max(const f32x16& a, const f32x16& b) {
    return each([&](int i) { return choose(a.v[i] > b.v[i], a.v[i], b.v[i]); });
}
inline f32x16 min(const f32x16& a, const f32x16& b) {
    return each([&](int i) { return choose(a.v[i] < b.v[i], a.v[i], b.v[i]); });
}

inline f32x16 load(const float* p) { f32x16 x; std::memcpy(&x, p, sizeof x); return x; }
inline void store(float* p, const f32x16& x) { std::memcpy(p, &x, sizeof x); }
inline f32x16 load(const bf16* p) {
    short_quad raw[quads];
    std::memcpy(raw, p, sizeof raw);
    return each([&](int i) { return quad(__builtin_convertvector(raw[i], bits_quad) << 16); });
}
inline void store(bf16* p, const f32x16& x) {
    short_quad raw[quads];
    for (int i = 0; i < quads; ++i) {
        const bits_quad bits = bits_quad(x.v[i]), nan = bits_quad(x.v[i] != x.v[i]);
        const bits_quad up = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        raw[i] = __builtin_convertvector((nan & 0x7fc0) | (~nan & up), short_quad);
    }
    std::memcpy(p, raw, sizeof raw);
}
inline f32x16 load(const f16*) { return zeros(); }  // never called: has_f16 is false
inline void store(f16*, const f32x16&) {}
inline f32x16 load(const std::int8_t* p) {
    f32x16 result;
    for (int i = 0; i < lanes; ++i) result.v[i / 4][i % 4] = float(p[i]);
    return result;
}

inline bf16x32 load_pairs(const bf16* p) { bf16x32 x; std::memcpy(&x, p, sizeof x); return x; }
inline bf16x32 all_pairs(const bf16* p) {
    std::uint32_t pair;
    std::memcpy(&pair, p, 4);
    bf16x32 x;
    for (bits_quad& own : x.v) own = bits_quad{pair, pair, pair, pair};
    return x;
}
// A pair in memory order: where bytes run the other way, the first of it is in the high half.
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
inline f32x16 first(const bf16x32& x) { return each([&](int i) { return quad(x.v[i] << 16); }); }
inline f32x16 second(const bf16x32& x) { return each([&](int i) { return quad(x.v[i] & 0xffff0000u); }); }
#else
inline f32x16 second(const bf16x32& x) { return each([&](int i) { return quad(x.v[i] << 16); }); }
inline f32x16 first(const bf16x32& x) { return each([&](int i) { return quad(x.v[i] & 0xffff0000u); }); }
#endif

inline float sum(const f32x16& x) {
    const quad four = (x.v[0] + x.v[2]) + (x.v[1] + x.v[3]);
    return (four[0] + four[2]) + (four[1] + four[3]);
}
inline float highest(const f32x16& x) {
    float result = x.v[0][0];
    for (int i = 1; i < lanes; ++i) result = x.v[i / 4][i % 4] > result ? x.v[i / 4][i % 4] : result;
    return result;
}

inline quad power_of_two(int_quad n) { return quad((n + 127) << 23); }
inline f32x16 scaled(const f32x16& p, const f32x16& n) {
    return each([&](int i) {
        const int_quad whole = __builtin_convertvector(n.v[i], int_quad), part = whole >> 1;
        return p.v[i] * power_of_two(part) * power_of_two(whole - part);
    });
}
// Adding and taking away 1.5 * 2 ** 23 leaves the nearest whole number, ties to even, below 2 ** 22.
inline f32x16 nearest(const f32x16& x) { return each([&](int i) { return (x.v[i] + 12582912.0f) - 12582912.0f; }); }
inline f32x16 where_not_less(const f32x16& a, const f32x16& b, const f32x16& x) {
    return each([&](int i) { return choose(a.v[i] < b.v[i], four(0), x.v[i]); });
}

struct i32x16 { std::uint32_t v[lanes]; };
inline i32x16 no_sums() { return {}; }
inline i32x16 load_words(const std::uint32_t* p) { i32x16 x; std::memcpy(&x, p, sizeof x); return x; }
inline void store_words(std::uint32_t* p, const i32x16& x) { std::memcpy(p, &x, sizeof x); }
inline i32x16 all_words(const std::int16_t* pair) {
    i32x16 x;
    for (int i = 0; i < lanes; ++i) std::memcpy(&x.v[i], pair, 4);
    return x;
}
// Two codes of each word in memory order, from byte `first` on, as 16-bit numbers.
inline i32x16 some_codes(const i32x16& x, int first) {
    i32x16 result;
    for (int i = 0; i < lanes; ++i) {
        std::int8_t codes[4];
        std::memcpy(codes, &x.v[i], 4);
        const std::int16_t pair[2] = {codes[first], codes[first + 2]};
        std::memcpy(&result.v[i], pair, 4);
    }
    return result;
}
inline i32x16 even_codes(const i32x16& x) { return some_codes(x, 0); }
inline i32x16 odd_codes(const i32x16& x) { return some_codes(x, 1); }
inline i32x16 dot_words(i32x16 sum, const i32x16& a, const i32x16& b) {
    for (int i = 0; i < lanes; ++i) {
        std::int16_t x[2], y[2];
        std::memcpy(x, &a.v[i], 4);
        std::memcpy(y, &b.v[i], 4);
        sum.v[i] += std::uint32_t(std::int32_t(x[0]) * y[0] + std::int32_t(x[1]) * y[1]);
    }
    return sum;
}
inline f32x16 floats(const i32x16& x) {
    f32x16 result;
    for (int i = 0; i < lanes; ++i) result.v[i / 4][i % 4] = float(std::int32_t(x.v[i]));
    return result;
}
inline i32x16 size_bits(const f32x16& x) {
    i32x16 result;
    std::memcpy(&result, &x, sizeof x);
    for (std::uint32_t& bits : result.v) bits &= 0x7fffffff;
    return result;
}
inline i32x16 max(i32x16 a, const i32x16& b) {  // of numbers that are not negative
    for (int i = 0; i < lanes; ++i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return a;
}
inline f32x16 floats_of_bits(const i32x16& x) { f32x16 result; std::memcpy(&result, &x, sizeof x); return result; }
inline void store_integers(std::int16_t* to, const f32x16& a, const f32x16& b) {
    constexpr int order[4] = {0, 2, 1, 3};
    const f32x16* both[2] = {&a, &b};
    for (int i = 0; i < 2 * lanes; ++i)
        to[i] = std::int16_t(nearest(*both[i / lanes]).v[i % lanes / 4][order[i % 4]]);
}

#endif

// ---- everywhere -----------------------------------------------------------------------------------------------

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
