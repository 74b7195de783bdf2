// Products of rows with packed weights, for one row to a whole prompt, with one order of additions.
//
// A kernel walks down the lines of a few tiles at once (see packing.h) and keeps one accumulator for each row and tile: so each output's sum runs over k from first to last,
// in one accumulator, however many rows, tiles and threads there are. Where the sum is interrupted, so that a piece
// of the weights serves many rows from the nearest cache, the accumulators are set down as they are.

#include "linear.h"
#include "small.h"

#include <algorithm>
#include <cstdlib>
#include <type_traits>

#include <omp.h>

namespace kvloom {
namespace {

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

// A piece of the rows and of k, as a kernel reads it.
template <class Element> struct Piece {
    const typename Format<Element>::Input* inputs;
    std::int64_t input_stride;  // from row to row
    const Element* weights;     // of the first tile
    std::int64_t tile_stride;   // elements from tile to tile
    std::int64_t lines;         // of each tile
    std::int64_t distance;      // how many lines ahead memory is asked for them,
    const Element* next;        // where the first tile goes on behind the last line,
    int asked;                  // and for how many tiles
    float* sums;                // [rows][tiles_a_piece][16], where sums are set down; null if the piece is all of k
    bool is_first, is_last;     // of k
};

// Of sums that are set down.
constexpr int tiles_a_piece = 4;

// Products of some rows with one tile, complete: bias, rounding, residual. Sums are `sums_stride` apart from row to row.
template <class Element>
void finish(const Projection& to, std::int64_t row, int rows, std::int64_t tile, const float* sums, std::int64_t sums_stride) {
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

// The products of some rows with some tiles over a piece of k.
template <class Element, int Rows, int Tiles>
void multiply(const Piece<Element>& piece, const Projection& to, std::int64_t row, std::int64_t tile) {
    using F = Format<Element>;
    constexpr int depth = depth_of<Element>;
    constexpr int line_elements = lanes * depth;
    f32x16 sums[Rows * Tiles];
    const auto set_down = [&](int r, int t) { return piece.sums + (r * tiles_a_piece + t) * lanes; };
    if (piece.is_first) unrolled<Rows * Tiles>([&](auto i) KVLOOM_INLINE { sums[i] = zeros(); });
    else unrolled<Rows * Tiles>([&](auto i) KVLOOM_INLINE { sums[i] = load(set_down(i / Tiles, i % Tiles)); });

    if (piece.is_last) ask_for_outputs<Element, Rows, Tiles>(to, row, tile);

    const auto* x = piece.inputs;
    const Element* w = piece.weights;
    const auto walk = [&](std::int64_t lines, const Element* ahead) KVLOOM_INLINE {
        for (std::int64_t line = 0; line < lines; ++line, w += line_elements, ahead += line_elements, x += depth) {
            decltype(F::line(w)) weights[Tiles];
            unrolled<Tiles>([&](auto t) KVLOOM_INLINE {
                weights[t] = F::line(w + t * piece.tile_stride);
                if (t < piece.asked) __builtin_prefetch(ahead + t * piece.tile_stride, 0, 3);
            });
            unrolled<Rows>([&](auto r) KVLOOM_INLINE {
                const auto inputs = F::inputs(x + r * piece.input_stride);
                unrolled<Tiles>([&](auto t) KVLOOM_INLINE {
                    sums[r * Tiles + t] = F::add(sums[r * Tiles + t], weights[t], inputs);
                });
            });
        }
    };
    const std::int64_t near = std::max<std::int64_t>(piece.lines - piece.distance, 0);
    walk(near, w + piece.distance * line_elements);
    walk(piece.lines - near, piece.next);

    if (!piece.is_last) {
        unrolled<Rows * Tiles>([&](auto i) KVLOOM_INLINE { store(set_down(i / Tiles, i % Tiles), sums[i]); });
        return;
    }
    alignas(64) float done[Rows][Tiles * lanes];
    unrolled<Rows * Tiles>([&](auto i) KVLOOM_INLINE { store(done[i / Tiles] + i % Tiles * lanes, sums[i]); });
    for (int t = 0; t < Tiles; ++t) finish<Element>(to, row, Rows, tile + t, done[0] + t * lanes, Tiles * lanes);
}

// Kernels by shape. Accumulators, the lines of the tiles and one input have to fit the registers.

template <class Element>
using Kernel = void (*)(const Piece<Element>&, const Projection&, std::int64_t row, std::int64_t tile);

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

// ---- the work of a call ---------------------------------------------------------------------------------------

std::int64_t tiles_of(const Projection& projection) { return ceil_div(projection.outputs, lanes); }

// Measured: with more rows a line is worked on for longer, and memory has to be asked for it earlier; and with one tile at a time
// (more than 8 rows) as much memory is more lines.
constexpr std::int64_t lines_ahead(std::int64_t rows) { return rows <= 4 ? 24 : rows <= 8 ? 48 : 160; }

// Few rows: weights are read once, in order, each thread a contiguous part of all projections' tiles.
template <class Element> void stream(const LinearCall& call, const Piece<Element>& whole) {
    const Kernels<Element> kernels = kernels_to_stream<Element>(call.rows);
    std::int64_t tiles = 0, before = 0;
    for (int p = 0; p < call.projection_count; ++p) tiles += tiles_of(call.projections[p]);
    const std::int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    const std::int64_t from = tiles * thread / threads, until = tiles * (thread + 1) / threads;
    for (int p = 0; p < call.projection_count; ++p) {
        const Projection& to = call.projections[p];
        const std::int64_t last = std::min(until - before, tiles_of(to));
        for (std::int64_t tile = std::max<std::int64_t>(from - before, 0); tile < last;) {
            const int taken = last - tile >= kernels.tiles ? kernels.tiles : 1;
            Piece<Element> piece = whole;
            piece.weights = static_cast<const Element*>(to.weights) + tile * piece.tile_stride;
            piece.next = piece.weights + taken * piece.tile_stride;
            piece.asked = taken;
            (taken == 1 ? kernels.run_single : kernels.run)(piece, to, 0, tile);
            tile += taken;
        }
        before += tiles_of(to);
    }
#pragma omp barrier
}

// Many rows: a piece of k of a few tiles stays in the nearest cache while the rows of a chunk pass by. Meanwhile the next
// piece is asked for.
// Measured: while memory is what is waited for, long pieces keep it busier; and 96 rows of outputs, which lie in as many pages,
// are what the CPU's table of pages has room for.
constexpr std::int64_t lines_a_piece(std::int64_t rows) { return rows <= 64 ? 512 : 448; }
constexpr std::int64_t rows_a_chunk = 96;

// Changes `piece` from call to call rather than copy it: GCC copies by vectors what was written number by number, and the CPU
// then waits until all outputs before have left for memory.
template <class Element>
void pass_by(Piece<Element>& piece, const Projection& to, std::int64_t first_row, std::int64_t rows, std::int64_t first_tile, float* sums) {
    const auto* inputs = piece.inputs;
    const Element *weights = piece.weights, *next = piece.next;
    const int tiles = int(std::min<std::int64_t>(tiles_a_piece, tiles_of(to) - first_tile));
    const std::int64_t calls = ceil_div(rows, kernels_for<Element>(rows).rows) * ceil_div(tiles, kernels_for<Element>(rows).tiles);
    const int asked = int(ceil_div(tiles, calls));
    int tile_to_ask = 0;
    for (std::int64_t row = 0; row < rows;) {
        const Kernels<Element> kernels = kernels_for<Element>(rows - row);
        for (int tile = 0; tile < tiles;) {
            const int taken = tiles - tile >= kernels.tiles ? kernels.tiles : 1;
            piece.inputs = inputs + row * piece.input_stride;
            piece.weights = weights + tile * piece.tile_stride;
            piece.sums = sums + (row * tiles_a_piece + tile) * lanes;
            piece.next = next + tile_to_ask * piece.tile_stride;
            piece.asked = tile_to_ask < tiles ? asked : 0;
            tile_to_ask += asked;
            (taken == 1 ? kernels.run_single : kernels.run)(piece, to, first_row + row, first_tile + tile);
            tile += taken;
        }
        row += kernels.rows;
    }
}

template <class Element> void sweep(const LinearCall& call, const Piece<Element>& whole) {
    constexpr int depth = depth_of<Element>;
    const std::int64_t chunks = ceil_div(call.rows, rows_a_chunk);
    std::int64_t groups = 0;
    for (int p = 0; p < call.projection_count; ++p) groups += ceil_div(tiles_of(call.projections[p]), tiles_a_piece);
    alignas(64) static thread_local float sums[rows_a_chunk * tiles_a_piece * lanes];
    Piece<Element> piece = whole;
#pragma omp for schedule(static)
    for (std::int64_t task = 0; task < chunks * groups; ++task) {
        const std::int64_t row = task % chunks * rows_a_chunk, rows = std::min(rows_a_chunk, call.rows - row);
        const Projection* to = call.projections;
        std::int64_t tile = task / chunks * tiles_a_piece;
        for (; tile >= tiles_of(*to); ++to) tile -= ceil_div(tiles_of(*to), tiles_a_piece) * tiles_a_piece;
        const auto* inputs = whole.inputs + row * whole.input_stride;
        const Element* weights = static_cast<const Element*>(to->weights) + tile * whole.tile_stride;
        for (std::int64_t line = 0; line < whole.lines; line += piece.lines) {
            piece.inputs = inputs + line * depth;
            piece.weights = weights + line * depth * lanes;
            piece.lines = std::min(lines_a_piece(call.rows), whole.lines - line);
            piece.distance = piece.lines;
            piece.is_first = line == 0;
            piece.is_last = line + piece.lines == whole.lines;
            piece.next = piece.is_last ? weights + tiles_a_piece * piece.tile_stride : piece.weights + piece.lines * depth * lanes;
            pass_by(piece, *to, row, rows, tile, sums);
        }
    }
}

// The rows as kernels read them: converted, and an odd k filled up with a zero.
template <class Element>
void convert(const LinearCall& call, typename Format<Element>::Input* to, std::int64_t stride) {
    const Element* inputs = static_cast<const Element*>(call.inputs);
#pragma omp for
    for (std::int64_t row = 0; row < call.rows; ++row) {
        for (std::int64_t k = 0; k < call.inner; ++k)
            from_float(to_float(inputs[row * call.input_stride + k]), to[row * stride + k]);
        for (std::int64_t k = call.inner; k < stride; ++k) from_float(0, to[row * stride + k]);
    }
}

template <class Element> void linear_of(const LinearCall& call) {
    using Input = typename Format<Element>::Input;
    const std::int64_t tile = tile_elements<Element>(call.inner), padded = tile / lanes;
    Piece<Element> whole{static_cast<const Input*>(call.inputs), call.input_stride, nullptr, tile,
                         padded / depth_of<Element>, lines_ahead(call.rows), nullptr, 0, nullptr, true, true};
    Input* converted = nullptr;
    if (!std::is_same<Input, Element>::value || padded != call.inner) {
#pragma omp single copyprivate(converted)
        converted = static_cast<Input*>(std::malloc(sizeof(Input) * call.rows * padded));
        convert<Element>(call, converted, padded);
        whole.inputs = converted;
        whole.input_stride = padded;
    }
    if (call.rows <= few_rows) stream(call, whole);
    else sweep(call, whole);
    if (converted) {
#pragma omp single
        std::free(converted);
    }
}

}  // namespace

void linear(const LinearCall& call) {
    if (call.rows < 1) return;
    switch (call.dtype) {
        case float32: return linear_of<float>(call);
        case bfloat16: return linear_of<bf16>(call);
        case float16: return linear_of<f16>(call);
    }
}

}  // namespace kvloom

using namespace kvloom;

KVLOOM_EXPORT void kvloom_linear(const LinearCall* call, int threads) {
#pragma omp parallel num_threads(threads)
    linear(*call);
}
