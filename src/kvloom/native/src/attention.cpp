// Attention over the paged store.
//
// The order of a row's additions follows from the positions of the tokens that its sequence holds, and from nothing
// else. Position p is column p % 64 of block p / 64; four blocks are a partition. Scores are summed over the dimension
// in ascending order. Within a partition blocks are taken in ascending order with a running maximum; partitions are merged in
// ascending order by one formula. A column that a row does not see, or that holds no token, weighs an exact zero, and a block
// or partition of such columns changes no bit. So a row gives the same bits in a chunk and alone, in any batch, shared or
// copied, by any number of threads.
//
// From the top: choose.h (what is read), division.h (items of work), worker.h (an item, block by block), observe.h (what keys
// received), scorer.h (a block's rows and scores), blocks.h (its scores and values), softmax.h; below them few_rows.h and
// product.h (numbers), integers.h (codes), kept.h (where keys and values are).

#include "attention.h"

#include <atomic>

#include <omp.h>

#include "choose.h"
#include "observe.h"
#include "worker.h"

namespace kvloom {
namespace {

template <class E> void merge_split(const Split& split, const Layer& layer, const float* partials, float* total) {
    const Shape& shape = layer.shape;
    const std::int64_t rows = split.set->tokens * shape.group;
    for (std::int64_t row = 0; row < rows; ++row) {
        clear(total, shape.columns());
        for (std::int64_t p = 0; p < split.partitions; ++p)
            merge(total, partials + split.first_partial + (p * rows + row) * shape.record(), shape.columns());
        const Token& token = layer.schedule.tokens[split.set->first_token + row / shape.group];
        finish<E>(total, layer, token, split.head * shape.group + row % shape.group);
    }
}

template <class E> std::int64_t worker_bytes(const Schedule& schedule, const Shape& shape) {
    const Header& header = *schedule.header;
    return Workspace<typename Arithmetic<E>::P>(shape, header.widest * shape.group, header.sealed, nullptr).bytes;
}

template <class E> void attend(Layer layer, const Observed* observed, char* memory, int threads) {
    const Header& header = *layer.schedule.header;
    const std::int64_t kv_heads = layer.shape.kv_heads, choices = header.choices * kv_heads;
    std::vector<std::int32_t> chosen(std::size_t(header.chosen * kv_heads * block_positions));
    layer.chosen = chosen.data();
    std::vector<Peak> peaks(observed ? std::size_t(header.tokens * kv_heads * layer.shape.group) : 0);
    if (observed) layer.peaks = peaks.data();
    const Lots lots(layer.schedule, observed);
    const Division division(layer.schedule, layer.shape, threads);
    const std::int64_t bytes = worker_bytes<E>(layer.schedule, layer.shape);
    float* partials = reinterpret_cast<float*>(memory + bytes * threads);
    const std::size_t items = division.items.size(), splits = division.splits.size();
    std::atomic<std::size_t> claimed{0};
    const auto claim = [&] {
        const std::size_t next = claimed.fetch_add(1, std::memory_order_relaxed);
        return next < items ? &division.items[next] : nullptr;
    };
#pragma omp parallel num_threads(threads)
    {
        char* own = memory + bytes * omp_get_thread_num();
        if (choices) {
#pragma omp for schedule(dynamic)
            for (std::int64_t i = 0; i < choices; ++i) choose<E>(layer, layer.schedule.choices[i / kv_heads], i % kv_heads);
        }
        Worker<E> worker(layer, own);
        for (const Item *item = claim(), *next; item; item = next)
            worker.run(*item, partials, [&] { return next = claim(); });
#pragma omp barrier
#pragma omp for schedule(dynamic)
        for (std::size_t i = 0; i < splits; ++i) merge_split<E>(division.splits[i], layer, partials, reinterpret_cast<float*>(own));
        if (observed) {
            Observer<E> observer(layer, *observed, own);
#pragma omp for schedule(dynamic)
            for (std::size_t i = 0; i < lots.blocks(); ++i) observer.observe(lots.begin(i), lots.end(i));
        }
    }
}

// Calls `function` with a null pointer to the type of the elements: 0 is float32, 1 bfloat16, 2 float16.
template <class Function> auto with_element(int element, Function function) {
    if (element == 1) return function(static_cast<bf16*>(nullptr));
    if (element == 2) return function(static_cast<f16*>(nullptr));
    return function(static_cast<float*>(nullptr));
}

}  // namespace
}  // namespace kvloom

using namespace kvloom;

// How many bytes of memory `kvloom_attend` wants to work in.
KVLOOM_EXPORT std::int64_t kvloom_attention_bytes(
    int element, const std::int32_t* schedule, std::int64_t kv_heads, std::int64_t group, std::int64_t key_dim,
    std::int64_t value_dim, int threads) {
    const Shape shape{kv_heads, group, key_dim, value_dim};
    const Schedule parts(schedule);
    const std::int64_t each = with_element(element, [&](auto* e) { return worker_bytes<std::remove_pointer_t<decltype(e)>>(parts, shape); });
    return each * threads + Division(parts, shape, threads).partials * std::int64_t(sizeof(float));
}

// Cosines and sines, [shifts, pairs], of a schedule's shifts times frequencies in radians a token.
KVLOOM_EXPORT void kvloom_turn_factors(const std::int32_t* schedule, const double* frequencies, std::int64_t pairs, float* cosines,
                                       float* sines) {
    const Schedule parts(schedule);
    for (std::int64_t i = 0; i < parts.header->shifts * pairs; ++i) {
        const double angle = double(parts.shifts[i / pairs]) * frequencies[i % pairs];
        cosines[i] = float(std::cos(angle));
        sines[i] = float(std::sin(angle));
    }
}

KVLOOM_EXPORT void kvloom_attend(
    int element, const std::int32_t* schedule, std::int64_t kv_heads, std::int64_t group, std::int64_t key_dim,
    std::int64_t value_dim, const void* queries, std::int64_t query_token_stride, std::int64_t query_head_stride,
    const void* keys, std::int64_t key_head_stride, const void* values, std::int64_t value_head_stride,
    const Sealed* sealed, const float* sinks, const Turn* turn, const Bounds* bounds, const Observed* observed, float scale,
    float softcap, void* out, void* memory, int threads) {
    const Layer layer{Schedule(schedule), {kv_heads, group, key_dim, value_dim}, queries, keys, values, query_token_stride,
                      query_head_stride, key_head_stride, value_head_stride, sealed, sealed ? sealed + 1 : nullptr, sinks, turn,
                      bounds, out, scale, softcap};
    with_element(element, [&](auto* e) {
        attend<std::remove_pointer_t<decltype(e)>>(layer, observed, static_cast<char*>(memory), threads);
    });
}
