// Linear layers over packed weights, for one row to a whole prompt: which thread multiplies which rows with which
// tiles.

#include "linear.h"
#include "multiply.h"

#include <algorithm>
#include <cstdlib>
#include <type_traits>

#include <omp.h>

namespace kvloom {
namespace {

std::int64_t tiles_of(const Projection& projection) { return ceil_div(projection.outputs, lanes); }

// Measured: with more rows a line is worked on for longer, and memory has to be asked for it earlier; and with one tile
// at a time (more than 8 rows) as much memory is more lines.
constexpr std::int64_t lines_ahead(std::int64_t rows) { return rows <= 4 ? 24 : rows <= 8 ? 48 : 160; }

// Few rows: weights are read once, in order, each thread a contiguous part of all projections' tiles.
template <class Element> void stream(const LinearCall& call, const Panel<Element>& whole) {
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
            Panel<Element> panel = whole;
            panel.weights = static_cast<const Element*>(to.weights) + tile * panel.tile_stride;
            panel.next = panel.weights + taken * panel.tile_stride;
            panel.asked = taken;
            (taken == 1 ? kernels.run_single : kernels.run)(panel, to, 0, tile);
            tile += taken;
        }
        before += tiles_of(to);
    }
#pragma omp barrier
}

// Many rows: a panel of k of a few tiles stays in the nearest cache while the rows of a chunk pass by. Meanwhile the
// next panel is asked for. Measured: while memory is what is waited for, long pieces keep it busier; and 96 rows of
// outputs, which lie in as many pages, are what the CPU's table of pages has room for.
constexpr std::int64_t lines_a_panel(std::int64_t rows) { return rows <= 64 ? 512 : 448; }
constexpr std::int64_t rows_a_chunk = 96;

// Changes `panel` from call to call rather than copy it: GCC copies by vectors what was written number by number, and
// the CPU then waits until all outputs before have left for memory.
template <class Element>
void pass_by(Panel<Element>& panel, const Projection& to, std::int64_t first_row, std::int64_t rows,
             std::int64_t first_tile, float* sums) {
    const auto* inputs = panel.inputs;
    const Element *weights = panel.weights, *next = panel.next;
    const int tiles = int(std::min<std::int64_t>(tiles_a_panel, tiles_of(to) - first_tile));
    const Kernels<Element> most = kernels_for<Element>(rows);
    const std::int64_t calls = ceil_div(rows, most.rows) * ceil_div(tiles, most.tiles);
    const int asked = int(ceil_div(tiles, calls));
    int tile_to_ask = 0;
    for (std::int64_t row = 0; row < rows;) {
        const Kernels<Element> kernels = kernels_for<Element>(rows - row);
        for (int tile = 0; tile < tiles;) {
            const int taken = tiles - tile >= kernels.tiles ? kernels.tiles : 1;
            panel.inputs = inputs + row * panel.input_stride;
            panel.weights = weights + tile * panel.tile_stride;
            panel.sums = sums + (row * tiles_a_panel + tile) * lanes;
            panel.next = next + tile_to_ask * panel.tile_stride;
            panel.asked = tile_to_ask < tiles ? asked : 0;
            tile_to_ask += asked;
            (taken == 1 ? kernels.run_single : kernels.run)(panel, to, first_row + row, first_tile + tile);
            tile += taken;
        }
        row += kernels.rows;
    }
}

template <class Element> void sweep(const LinearCall& call, const Panel<Element>& whole) {
    constexpr int depth = depth_of<Element>;
    const std::int64_t chunks = ceil_div(call.rows, rows_a_chunk);
    std::int64_t groups = 0;
    for (int p = 0; p < call.projection_count; ++p) groups += ceil_div(tiles_of(call.projections[p]), tiles_a_panel);
    alignas(64) static thread_local float sums[rows_a_chunk * tiles_a_panel * lanes];
    Panel<Element> panel = whole;
#pragma omp for schedule(static)
    for (std::int64_t task = 0; task < chunks * groups; ++task) {
        const std::int64_t row = task % chunks * rows_a_chunk, rows = std::min(rows_a_chunk, call.rows - row);
        const Projection* to = call.projections;
        std::int64_t tile = task / chunks * tiles_a_panel;
        for (; tile >= tiles_of(*to); ++to) tile -= ceil_div(tiles_of(*to), tiles_a_panel) * tiles_a_panel;
        const auto* inputs = whole.inputs + row * whole.input_stride;
        const Element* weights = static_cast<const Element*>(to->weights) + tile * whole.tile_stride;
        for (std::int64_t line = 0; line < whole.lines; line += panel.lines) {
            panel.inputs = inputs + line * depth;
            panel.weights = weights + line * depth * lanes;
            panel.lines = std::min(lines_a_panel(call.rows), whole.lines - line);
            panel.distance = panel.lines;
            panel.is_first = line == 0;
            panel.is_last = line + panel.lines == whole.lines;
            panel.next = panel.is_last ? weights + tiles_a_panel * panel.tile_stride
                                       : panel.weights + panel.lines * depth * lanes;
            pass_by(panel, *to, row, rows, tile, sums);
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
    Panel<Element> whole{static_cast<const Input*>(call.inputs), call.input_stride, nullptr, tile,
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
