// Sixteen floats in one register of AVX512. Included by simd.h alone.
#pragma once

namespace kvloom {

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

}  // namespace kvloom
