// How much attention each token held receives from the rows that are observed, over all heads.
//
// Attention itself keeps no weights: once a row's maximum and its sum are known, its scores are computed again, in the same
// order and so with the same bits, and become weights. What a token receives is added up in one order: heads ascending, then
// rows ascending; so it depends neither on threads nor on what else is in the row. A block of 64 positions belongs to one
// thread, whatever reads it.
#pragma once

#include <algorithm>
#include <vector>

#include "scorer.h"

namespace kvloom {

// Observed tokens of one source that read one stride, as indices of the set's tokens.
struct Lot {
    const Set* set;
    const Stride* stride;
    std::int32_t begin, end;
    std::int64_t source;
};

// All lots, those of one block of positions together.
class Lots {
public:
    Lots(const Schedule& schedule, const Observed* observed) {
        if (!observed) return;
        for (const Set* set = schedule.sets; set < schedule.sets + schedule.header->sets; ++set)
            for (std::int32_t s = set->first_stride; s < set->first_stride + set->strides; ++s)
                add(*set, schedule.strides[s], schedule.tokens + set->first_token, *observed);
        // A token is read natively by the rows of its own block, and as codes by those behind it: so rows ascend.
        std::stable_sort(lots_.begin(), lots_.end(), [](const Lot& a, const Lot& b) {
            return a.stride->index != b.stride->index ? a.stride->index < b.stride->index : a.stride->native > b.stride->native;
        });
        for (std::size_t i = 0; i < lots_.size(); ++i)
            if (!i || lots_[i].stride->index != lots_[i - 1].stride->index) begins_.push_back(i);
        begins_.push_back(lots_.size());
    }

    std::size_t blocks() const { return begins_.empty() ? 0 : begins_.size() - 1; }
    const Lot* begin(std::size_t block) const { return lots_.data() + begins_[block]; }
    const Lot* end(std::size_t block) const { return lots_.data() + begins_[block + 1]; }

private:
    void add(const Set& set, const Stride& stride, const Token* tokens, const Observed& observed) {
        for (std::int32_t i = stride.begin; i < stride.end; ++i) {
            const ObservedSource *end = observed.sources + observed.count, *source = std::upper_bound(
                observed.sources, end, tokens[i].row, [](std::int64_t row, const ObservedSource& own) { return row < own.end_row; });
            if (source == end || tokens[i].row < source->first_row) continue;
            const std::int64_t number = source - observed.sources;
            if (i > stride.begin && !lots_.empty() && lots_.back().stride == &stride && lots_.back().end == i && lots_.back().source == number)
                ++lots_.back().end;
            else lots_.push_back({&set, &stride, i, i + 1, number});
        }
    }

    std::vector<Lot> lots_;
    std::vector<std::size_t> begins_;
};

template <class E> class Observer : Scorer<E> {
    using Base = Scorer<E>;
    using Base::codes_, Base::head_, Base::layer_, Base::native_, Base::numbers_, Base::shape_, Base::space_;

public:
    Observer(const Layer& layer, const Observed& observed, char* memory)
        : Base(layer, memory), observed_(observed), sums_(std::size_t(observed.count * block_positions)) {}

    // Adds what the tokens of a block receive from some lots, which are all that read it.
    void observe(const Lot* begin, const Lot* end) {
        std::fill(sums_.begin(), sums_.end(), 0.0f);
        for (std::int64_t head = 0; head < shape_.kv_heads; ++head)
            for (const Lot* lot = begin; lot < end; ++lot) take(*lot, head);
        for (std::int64_t source = 0; source < observed_.count; ++source) add_to_held(source, begin->stride->index);
    }

private:
    void take(const Lot& lot, std::int64_t head) {
        const std::int64_t begin = lot.begin * shape_.group, end = lot.end * shape_.group;
        this->begin(*lot.set, head);
        this->take_queries(lot.stride->pass, begin, end);
        this->see(*lot.stride, begin, end);
        if constexpr (Base::multiplies_codes)
            if (!native_) return take(codes_, lot, begin, end);
        take(numbers_, lot, begin, end);
    }

    template <class Kind> void take(Kind& block, const Lot& lot, std::int64_t begin, std::int64_t end) {
        const std::int32_t *slots = layer_.slots_of(*lot.stride, 0), index = lot.stride->index;
        const std::int32_t* gaps = has_gaps(slots) ? slots : nullptr;
        Place place;
        head_.find(slots, native_, space_.nothing, place);
        block.read({&head_, slots, native_, &place, nullptr, false}, end - begin);
        float* sums = sums_.data() + lot.source * block_positions;
        this->for_each_strip(block, index, begin, end, [&](std::int64_t row, int rows) {
            this->score(block, gaps, index, row, rows);
            for (int r = 0; r < rows; ++r) add_weights(space_.scores[r], row + r, sums);
        });
    }

    void add_weights(const float* scores, std::int64_t row, float* sums) const {
        const std::int64_t heads = shape_.kv_heads * shape_.group;
        const Peak& peak = layer_.peaks[this->token_of(row).row * heads + this->query_head_of(row)];
        for (int v = 0; v < block_vectors; ++v) {
            const f32x16 weights = power(load(scores + v * lanes) - all(peak.top));
            store(sums + v * lanes, fma(weights, all(peak.share), load(sums + v * lanes)));
        }
    }

    // From positions of a block to where the masses of those that are held go.
    void add_to_held(std::int64_t source, std::int64_t block) {
        const ObservedSource& own = observed_.sources[source];
        const std::int64_t begin = block * block_positions, end = begin + block_positions;
        const HeldRun *runs = observed_.runs + own.first_run, *last = runs + own.runs;
        const float* sums = sums_.data() + source * block_positions;
        for (const HeldRun* run = std::lower_bound(runs, last, begin,
                 [](const HeldRun& own, std::int64_t position) { return own.first + own.count <= position; });
             run < last && run->first < end; ++run) {
            const std::int64_t from = std::max(begin, run->first), to = std::min(end, run->first + run->count);
            for (std::int64_t position = from; position < to; ++position)
                observed_.masses[run->place + position - run->first] += sums[position - begin];
        }
    }

    const Observed& observed_;
    std::vector<float> sums_;  // [sources, 64], of the block at hand
};

}  // namespace kvloom
