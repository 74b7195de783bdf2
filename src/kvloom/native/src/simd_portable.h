// Sixteen floats in four vectors of four, which GCC and Clang have on every CPU. Included by simd.h alone.
#pragma once

namespace kvloom {

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

}  // namespace kvloom
