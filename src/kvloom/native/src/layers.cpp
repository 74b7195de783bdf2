// A model, or some of its decoder layers, strung together without a way back to Python.
//
// A layer is x += output(attention(query, key, value of norm(x))); x += down(silu(gate(norm(x))) * up(norm(x))).

#include <algorithm>
#include <cstring>

#include "attention.h"
#include "bounds.h"
#include "linear.h"
#include "seal.h"
#include "small.h"

namespace kvloom {

// Layouts are those of ctypes structures in layers.py.

struct Weight {
    const void* packed;
    const void* bias;  // or null
    std::int64_t outputs;
};

struct Norm {
    const void* weight;  // null if there is none
    float epsilon;
    std::int32_t unused;
};

struct DecoderLayer {
    Norm input_norm, query_norm, key_norm, post_norm;
    Weight query, key, value, output, gate, up, down;
    std::int64_t hidden, heads, kv_heads, dim;
    std::int64_t group;  // of layers with the same reach
    float scale;
    std::int32_t unused;
};

// Where a layer's keys and values are kept: [kv_heads, slots, dim], with a stride in elements from head to head. Where full
// blocks are sealed, these are the open ones'.
struct KeysValues {
    void* keys;
    void* values;
    std::int64_t stride;
    Sealed sealed[2];  // keys and values; without codes if nothing is sealed
    Bounds bounds;     // of full blocks; without numbers if there are none
};

// Where new tokens land where full blocks are sealed; see cache/landing.py, which also says what "native order" is.
struct Landing {
    const std::int64_t* earlier_slots;  // [earlier]
    const std::int64_t* filled_blocks;  // [filled]
    const std::int64_t* filled_from;    // [filled, block_tokens]
    const std::int64_t *open_rows, *open_slots;  // [open]
    std::int64_t earlier, filled, open;
};

// What the layers of one group write and read.
struct GroupStep {
    const std::int64_t* slots;  // [rows]; null where full blocks are sealed
    Landing landing;
    const std::int32_t* schedule;
    const Turn* turn;  // null if no query is turned
    const Observed* observed;  // null if nobody wants to know
};

// One pass, for all layers: rows, and buffers for as many.
struct LayersStep {
    void* hidden;  // [rows, hidden], the rows on their way through the layers
    void* normed;  // [rows, hidden]
    void* query;   // [rows, heads * dim]
    void* key;     // [rows, kv_heads * dim]
    void* value;   // [rows, kv_heads * dim]
    void* attended;  // [rows, heads * dim]
    void* gate;      // [rows, intermediate]
    void* up;        // [rows, intermediate]
    float* cosines;  // [rows, dim / 2]
    float* sines;
    const GroupStep* groups;
    void* memory;  // for the native order, and for attention
    std::int64_t rows;
    std::int32_t dtype;
    std::int32_t threads;
};

// What is before the layers and behind them.
struct Ends {
    const void* embeddings;  // [vocabulary, hidden], or null: then those of the packed output layer
    Norm norm;
    Weight head;
    std::int64_t vocabulary;  // of the embeddings
    std::int64_t half;        // dim / 2
    const std::int64_t* token_ids;   // [rows]
    const std::int64_t* positions;   // [rows]
    const float* frequencies;        // [half]
    const std::int64_t* logit_rows;  // [logit_count]
    std::int64_t logit_count;
    void* logits;  // [logit_count, outputs of the head]
    float scaling;  // of cosines and sines
    std::int32_t unused;
};

namespace {

// What follows is called by every thread of a parallel region, which then share the work.

template <class Function> inline void share(std::int64_t count, Function function) {
#pragma omp for schedule(static)
    for (std::int64_t i = 0; i < count; ++i) function(i);
}

template <class Element> void norm(const LayersStep& step, const Norm& norm, std::int64_t columns) {
    share(step.rows, [&](std::int64_t row) {
        norm_row(static_cast<const Element*>(step.hidden) + row * columns, static_cast<const Element*>(norm.weight),
                 static_cast<Element*>(step.normed) + row * columns, columns, norm.epsilon);
    });
}

Projection project(const Weight& weight, void* to, const void* residual = nullptr) {
    return {weight.packed, weight.bias, residual, to, weight.outputs, weight.outputs, weight.outputs};
}

template <int Count>
void multiply(const LayersStep& step, const void* from, std::int64_t inner, const Projection (&to)[Count]) {
    linear({from, step.rows, inner, inner, to, Count, step.dtype});
}

// One row of keys and of values, [kv_heads, dim] each, into a slot.
template <class Element>
void put_into_slot(const KeysValues& kept, std::int64_t slot, const Element* key, const Element* value, const DecoderLayer& layer) {
    for (std::int64_t head = 0; head < layer.kv_heads; ++head) {
        const std::int64_t column = head * layer.dim, place = head * kept.stride + slot * layer.dim;
        std::copy_n(key + column, layer.dim, static_cast<Element*>(kept.keys) + place);
        std::copy_n(value + column, layer.dim, static_cast<Element*>(kept.values) + place);
    }
}

template <class Element>
void copy_slot(const KeysValues& from, std::int64_t slot, const KeysValues& to, std::int64_t target, const DecoderLayer& layer) {
    for (std::int64_t head = 0; head < layer.kv_heads; ++head) {
        const std::int64_t source = head * from.stride + slot * layer.dim, place = head * to.stride + target * layer.dim;
        std::copy_n(static_cast<const Element*>(from.keys) + source, layer.dim, static_cast<Element*>(to.keys) + place);
        std::copy_n(static_cast<const Element*>(from.values) + source, layer.dim, static_cast<Element*>(to.values) + place);
    }
}

bool seals(const KeysValues& kept) { return kept.sealed[0].codes; }

std::int64_t element_bytes(const LayersStep& step) { return step.dtype == 0 ? 4 : 2; }

// The native order: at the beginning of the step's memory, keys first.
struct NativeOrder {
    KeysValues kept;
    std::int64_t bytes;

    NativeOrder(const DecoderLayer& layer, const LayersStep& step) {
        const std::int64_t tokens = step.groups[layer.group].landing.earlier + step.rows;
        const std::int64_t half = rounded_up(layer.kv_heads * tokens * layer.dim * element_bytes(step), 64);
        char* memory = static_cast<char*>(step.memory);
        kept = {memory, memory + half, tokens * layer.dim, {}, {}};
        bytes = 2 * half;
    }
};

// From the native order into codes and open blocks. Nothing that was there is changed, so that a step can be taken back.
template <class Element> void land(const DecoderLayer& layer, const KeysValues& kept, const KeysValues& native, const LayersStep& step) {
    const Landing& landing = step.groups[layer.group].landing;
    const std::int64_t parts = landing.filled * layer.kv_heads;
    const Numbers numbers{native.keys, native.values, native.stride, native.stride, layer.dim, layer.dim};
    share(parts + landing.open, [&](std::int64_t i) {
        if (i >= parts)
            return copy_slot<Element>(native, landing.earlier + landing.open_rows[i - parts], kept, landing.open_slots[i - parts], layer);
        const std::int64_t block = landing.filled_blocks[i / layer.kv_heads], head = i % layer.kv_heads;
        seal<Element>(kept.sealed, numbers, landing.filled_from + i / layer.kv_heads * kept.sealed[0].block_tokens, block, head);
        if (kept.bounds.numbers) bound_codes<Element>(kept.bounds, kept.sealed[0], layer.kv_heads, layer.dim, head, block);
    });
}

// The bounds of the blocks whose last slot was written.
template <class Element> void note_bounds(const DecoderLayer& layer, const KeysValues& kept, const LayersStep& step) {
    const std::int64_t *slots = step.groups[layer.group].slots, tokens = kept.bounds.block_tokens;
    share(step.rows * layer.kv_heads, [&](std::int64_t i) {
        const std::int64_t slot = slots[i / layer.kv_heads];
        if (slot % tokens == tokens - 1)
            bound_keys<Element>(kept.bounds, kept.keys, kept.stride, layer.kv_heads, layer.dim, i % layer.kv_heads, slot / tokens);
    });
}

template <class Element> void before_attention(const DecoderLayer& layer, const KeysValues& kept, const LayersStep& step) {
    norm<Element>(step, layer.input_norm, layer.hidden);
    const Projection to[] = {project(layer.query, step.query), project(layer.key, step.key),
                             project(layer.value, step.value)};
    multiply(step, step.normed, layer.hidden, to);
    const GroupStep& group = step.groups[layer.group];
    const std::int64_t earlier = group.landing.earlier;
    const NativeOrder native(layer, step);
    share(step.rows + earlier, [&](std::int64_t row) {
        if (row >= step.rows)
            return copy_slot<Element>(kept, group.landing.earlier_slots[row - step.rows], native.kept, row - step.rows, layer);
        const float *cosines = step.cosines + row * (layer.dim / 2), *sines = step.sines + row * (layer.dim / 2);
        Element* query = static_cast<Element*>(step.query) + row * layer.heads * layer.dim;
        Element* key = static_cast<Element*>(step.key) + row * layer.kv_heads * layer.dim;
        const Element* value = static_cast<const Element*>(step.value) + row * layer.kv_heads * layer.dim;
        rotate_row(query, static_cast<const Element*>(layer.query_norm.weight), layer.query_norm.epsilon, cosines,
                   sines, layer.heads, layer.dim);
        rotate_row(key, static_cast<const Element*>(layer.key_norm.weight), layer.key_norm.epsilon, cosines, sines,
                   layer.kv_heads, layer.dim);
        if (seals(kept)) put_into_slot(native.kept, earlier + row, key, value, layer);
        else put_into_slot(kept, group.slots[row], key, value, layer);
    });
    if (seals(kept)) land<Element>(layer, kept, native.kept, step);
    else if (kept.bounds.numbers) note_bounds<Element>(layer, kept, step);
}

template <class Element> void after_attention(const DecoderLayer& layer, const LayersStep& step) {
    const Projection output[] = {project(layer.output, step.hidden, step.hidden)};
    multiply(step, step.attended, layer.heads * layer.dim, output);
    norm<Element>(step, layer.post_norm, layer.hidden);
    const Projection both[] = {project(layer.gate, step.gate), project(layer.up, step.up)};
    multiply(step, step.normed, layer.hidden, both);
    // In pieces, so that one row is work for all threads; each number stands by itself.
    const std::int64_t columns = layer.gate.outputs, size = 16 * lanes, pieces = (columns + size - 1) / size;
    share(step.rows * pieces, [&](std::int64_t i) {
        const std::int64_t first = i % pieces * size, at = i / pieces * columns + first;
        silu_times_row(static_cast<Element*>(step.gate) + at, static_cast<const Element*>(step.up) + at,
                       std::min(size, columns - first));
    });
    const Projection down[] = {project(layer.down, step.hidden, step.hidden)};
    multiply(step, step.gate, columns, down);
}

template <class Element> void before_layers(const Ends& ends, std::int64_t hidden, const LayersStep& step) {
    if (ends.embeddings)
        share(step.rows, [&](std::int64_t row) {
            std::memcpy(static_cast<Element*>(step.hidden) + row * hidden,
                        static_cast<const Element*>(ends.embeddings) + ends.token_ids[row] * hidden,
                        std::size_t(hidden) * sizeof(Element));
        });
    else look_up(step.dtype, ends.head.packed, hidden, ends.token_ids, step.rows, step.hidden);
    share(step.rows, [&](std::int64_t row) {
        factors_row<Element>(ends.positions[row], ends.frequencies, ends.scaling, step.cosines + row * ends.half,
                             step.sines + row * ends.half, ends.half);
    });
}

// The rows whose logits are wanted take the place of the normed ones.
template <class Element> void behind_layers(const Ends& ends, std::int64_t hidden, const LayersStep& step) {
    share(ends.logit_count, [&](std::int64_t i) {
        norm_row(static_cast<const Element*>(step.hidden) + ends.logit_rows[i] * hidden,
                 static_cast<const Element*>(ends.norm.weight), static_cast<Element*>(step.normed) + i * hidden, hidden,
                 ends.norm.epsilon);
    });
    const Projection head = project(ends.head, ends.logits);
    linear({step.normed, ends.logit_count, hidden, hidden, &head, 1, step.dtype});
}

void attend(const DecoderLayer& layer, const KeysValues& kept, const LayersStep& step) {
    const NativeOrder native(layer, step);
    const bool sealed = seals(kept);
    const KeysValues& read = sealed ? native.kept : kept;
    const GroupStep& group = step.groups[layer.group];
    kvloom_attend(step.dtype, group.schedule, layer.kv_heads, layer.heads / layer.kv_heads, layer.dim,
                  layer.dim, step.query, layer.heads * layer.dim, layer.dim, read.keys, read.stride, read.values, read.stride,
                  sealed ? kept.sealed : nullptr, nullptr, group.turn, kept.bounds.numbers ? &kept.bounds : nullptr, group.observed,
                  layer.scale, 0, step.attended,
                  static_cast<char*>(step.memory) + (sealed ? native.bytes : 0), step.threads);
}

}  // namespace
}  // namespace kvloom

using namespace kvloom;

// Runs `step.hidden` through `count` layers. With `ends`, it begins with token ids and ends with logits; returns 1, with
// nothing done, if an id is beyond the vocabulary, else 0.
KVLOOM_EXPORT int kvloom_layers(const DecoderLayer* layers, const KeysValues* kept, std::int64_t count,
                                const LayersStep* step, const Ends* ends) {
    if (ends)
        for (std::int64_t row = 0; row < step->rows; ++row)
            if (ends->token_ids[row] < 0 || ends->token_ids[row] >= ends->vocabulary) return 1;
    with_type(step->dtype, [&](auto* type) {
        using Element = std::remove_pointer_t<decltype(type)>;
        for (std::int64_t i = 0; i < count; ++i) {
#pragma omp parallel num_threads(step->threads)
            {
                if (i) after_attention<Element>(layers[i - 1], *step);
                else if (ends) before_layers<Element>(*ends, layers[0].hidden, *step);
                before_attention<Element>(layers[i], kept[i], *step);
            }
            attend(layers[i], kept[i], *step);
        }
#pragma omp parallel num_threads(step->threads)
        {
            after_attention<Element>(layers[count - 1], *step);
            if (ends) behind_layers<Element>(*ends, layers[0].hidden, *step);
        }
    });
    return 0;
}
