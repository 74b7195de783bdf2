// Products of some rows with some tiles of packed weights, with one order of additions.
//
// A kernel walks down the lines of a few tiles at once (see packing.h) and keeps one accumulator for each row and tile:
// so each output's sum runs over k from first to last, in one accumulator, however many rows, tiles and threads there
// are. Where the sum is interrupted, so that a panel of the weights serves many rows from the nearest cache, the
// accumulators are set down as they are.
#pragma once

#include <algorithm>
#include <cstdint>

#include "linear.h"
#include "small.h"

namespace kvloom {

// How a dtype's lines are read. Input is what rows are converted to before the kernels see them.

template <class Element> struct Format {  // float32, float16
    using Input = float;
    static f32x16 line(const Element* weights) { return load(weights); }
    static f32x16 inputs(const Input* x) { return all(*x); }
    static f32x16 add(f32x16 sums, const f32x16& line, const f32x16& inputs) { return fma(line, inputs, sums); }
};

template <> struct Format<bf16> {
#if defined(KVLOOM_DOT_BF16)
    using Input = bf16;
    static bf16x32 line(const bf16* weights) { return load_pairs(weights); }
    static bf16x32 inputs(const Input* x) { return all_pairs(x); }
    static f32x16 add(f32x16 sums, const bf16x32& line, const bf16x32& inputs) { return dot_pairs(sums, line, inputs); }
#else
    struct Two { f32x16 first, second; };
    using Input = float;
    static Two line(const bf16* weights) {
        const bf16x32 pairs = load_pairs(weights);
        return {first(pairs), second(pairs)};
    }
    static Two inputs(const Input* x) { return {all(x[0]), all(x[1])}; }
    static f32x16 add(f32x16 sums, const Two& line, const Two& inputs) {
        return fma(line.second, inputs.second, fma(line.first, inputs.first, sums));
    }
#endif
};

// A panel of the rows and of k, as a kernel reads it.
template <class Element> struct Panel {
    const typename Format<Element>::Input* inputs;
    std::int64_t input_stride;  // from row to row
    const Element* weights;     // of the first tile
    std::int64_t tile_stride;   // elements from tile to tile
    std::int64_t lines;         // of each tile
    std::int64_t distance;      // how many lines ahead memory is asked for them,
    const Element* next;        // where the first tile goes on behind the last line,
    int asked;                  // and for how many tiles
    float* sums;                // [rows][tiles_a_panel][16], where sums are set down; null if the panel is all of k
    bool is_first, is_last;     // of k
};

// Of sums that are set down.
constexpr int tiles_a_panel = 4;

// Products of some rows with one tile, complete: bias, rounding, residual. Sums are `sums_stride` apart from row to
// row.
template <class Element>
void finish(const Projection& to, std::int64_t row, int rows, std::int64_t tile, const float* sums,
            std::int64_t sums_stride) {
    const std::int64_t n = tile * lanes;
    const int count = int(std::min<std::int64_t>(lanes, to.outputs - n));
    const f32x16 bias = to.bias ? get(static_cast<const Element*>(to.bias) + n, count) : zeros();
    Element* output = static_cast<Element*>(to.output) + row * to.output_stride + n;
    const Element* residual = static_cast<const Element*>(to.residual) + row * to.residual_stride + n;
    for (; rows--; sums += sums_stride, output += to.output_stride, residual += to.residual_stride) {
        f32x16 own = load(sums);
        if (to.bias) own = own + bias;
        if (to.residual) own = as_stored<Element>(own) + get(residual, count);
        put(output, own, count);
    }
}

// Asks memory for what finish() reads and writes. Inline, or GCC 12 leaves it out: see Ahead in pack.h.
template <class Element, int Rows, int Tiles>
KVLOOM_INLINE inline void ask_for_outputs(const Projection& to, std::int64_t row, std::int64_t tile) {
    constexpr int step = 64 / sizeof(Element);
    const auto* output = static_cast<const Element*>(to.output) + row * to.output_stride + tile * lanes;
    const auto* residual = static_cast<const Element*>(to.residual) + row * to.residual_stride + tile * lanes;
    for (int r = 0; r < Rows; ++r, output += to.output_stride, residual += to.residual_stride)
        for (int i = 0; i < Tiles * lanes; i += step) {
            __builtin_prefetch(output + i, 1, 3);
            if (to.residual) __builtin_prefetch(residual + i, 0, 3);
        }
}

// The products of some rows with some tiles over a panel of k.
template <class Element, int Rows, int Tiles>
void multiply(const Panel<Element>& panel, const Projection& to, std::int64_t row, std::int64_t tile) {
    using F = Format<Element>;
    constexpr int depth = depth_of<Element>;
    constexpr int line_elements = lanes * depth;
    f32x16 sums[Rows * Tiles];
    const auto set_down = [&](int r, int t) { return panel.sums + (r * tiles_a_panel + t) * lanes; };
    if (panel.is_first) unrolled<Rows * Tiles>([&](auto i) KVLOOM_INLINE { sums[i] = zeros(); });
    else unrolled<Rows * Tiles>([&](auto i) KVLOOM_INLINE { sums[i] = load(set_down(i / Tiles, i % Tiles)); });

    if (panel.is_last) ask_for_outputs<Element, Rows, Tiles>(to, row, tile);

    const auto* x = panel.inputs;
    const Element* w = panel.weights;
    const auto walk = [&](std::int64_t lines, const Element* ahead) KVLOOM_INLINE {
        for (std::int64_t line = 0; line < lines; ++line, w += line_elements, ahead += line_elements, x += depth) {
            decltype(F::line(w)) weights[Tiles];
            unrolled<Tiles>([&](auto t) KVLOOM_INLINE {
                weights[t] = F::line(w + t * panel.tile_stride);
                if (t < panel.asked) __builtin_prefetch(ahead + t * panel.tile_stride, 0, 3);
            });
            unrolled<Rows>([&](auto r) KVLOOM_INLINE {
                const auto inputs = F::inputs(x + r * panel.input_stride);
                unrolled<Tiles>([&](auto t) KVLOOM_INLINE {
                    sums[r * Tiles + t] = F::add(sums[r * Tiles + t], weights[t], inputs);
                });
            });
        }
    };
    const std::int64_t near = std::max<std::int64_t>(panel.lines - panel.distance, 0);
    walk(near, w + panel.distance * line_elements);
    walk(panel.lines - near, panel.next);

    if (!panel.is_last) {
        unrolled<Rows * Tiles>([&](auto i) KVLOOM_INLINE { store(set_down(i / Tiles, i % Tiles), sums[i]); });
        return;
    }
    alignas(64) float done[Rows][Tiles * lanes];
    unrolled<Rows * Tiles>([&](auto i) KVLOOM_INLINE { store(done[i / Tiles] + i % Tiles * lanes, sums[i]); });
    for (int t = 0; t < Tiles; ++t) finish<Element>(to, row, Rows, tile + t, done[0] + t * lanes, Tiles * lanes);
}

// Kernels by shape. Accumulators, the lines of the tiles and one input have to fit the registers.

template <class Element>
using Kernel = void (*)(const Panel<Element>&, const Projection&, std::int64_t row, std::int64_t tile);

template <class Element> struct Kernels {
    int rows, tiles;
    Kernel<Element> run, run_single;  // for so many tiles, and for one
};

template <class Element, int Rows, int Tiles> constexpr Kernels<Element> kernels() {
    return {Rows, Tiles, multiply<Element, Rows, Tiles>, multiply<Element, Rows, 1>};
}

// The kernels to begin with where so many rows are left.
template <class Element> Kernels<Element> kernels_for(std::int64_t rows) {
    if constexpr (vector_registers >= 32) {
        switch (rows) {
            case 1: return kernels<Element, 1, 4>();
            case 2: return kernels<Element, 2, 4>();
            case 3: return kernels<Element, 3, 4>();
            case 4: return kernels<Element, 4, 4>();
            case 5: return kernels<Element, 5, 4>();
            case 7: return kernels<Element, 7, 2>();
            case 8: case 13: case 14: case 15: case 16: return kernels<Element, 8, 2>();
            default: return kernels<Element, 6, 4>();
        }
    } else {
        switch (rows) {
            case 1: return kernels<Element, 1, 4>();
            case 2: return kernels<Element, 2, 2>();
            case 3: return kernels<Element, 3, 1>();
            default: return kernels<Element, 4, 1>();
        }
    }
}

// So many rows one kernel takes.
constexpr std::int64_t few_rows = vector_registers >= 32 ? 16 : 4;

// The kernels for all of a few rows at once, so that weights are read once.
template <class Element> Kernels<Element> kernels_to_stream(std::int64_t rows) {
    if constexpr (vector_registers >= 32) {
        switch (rows) {
            case 9: return kernels<Element, 9, 1>();
            case 10: return kernels<Element, 10, 1>();
            case 11: return kernels<Element, 11, 1>();
            case 12: return kernels<Element, 12, 1>();
            case 13: return kernels<Element, 13, 1>();
            case 14: return kernels<Element, 14, 1>();
            case 15: return kernels<Element, 15, 1>();
            case 16: return kernels<Element, 16, 1>();
        }
    }
    return kernels_for<Element>(rows);
}

}  // namespace kvloom
