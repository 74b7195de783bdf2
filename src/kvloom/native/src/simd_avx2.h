// Sixteen floats in two registers of AVX2. Included by simd.h alone.
#pragma once

namespace kvloom {

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

}  // namespace kvloom
