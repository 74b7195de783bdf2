// What one thread does with an item of the work: block after block, for the rows of a set.
#pragma once

#include "division.h"
#include "scorer.h"

namespace kvloom {

template <class E> class Worker : Scorer<E> {
    using Base = Scorer<E>;
    using Base::codes_, Base::head_, Base::layer_, Base::native_, Base::number_, Base::numbers_, Base::pass_, Base::rows_, Base::shape_,
        Base::space_, Base::tokens_;

public:
    Worker(const Layer& layer, char* memory) : Base(layer, memory) {}

    // `claim`: called when the last block is read, says which item this thread takes next, or null.
    template <class Claim> void run(const Item& item, float* partials, Claim claim) {
        this->begin(*item.set, item.head);
        if (item.begin < item.end) {
            find(head_, item.head, *item.begin);
            now_ = !now_;
            this->take_queries(item.begin->pass, 0, rows_);
            this->see(*item.begin, 0, rows_);
        }
        if (item.whole)
            for (std::int64_t row = 0; row < rows_; ++row) clear(space_.totals + row * shape_.record(), shape_.columns());
        for (const Stride* stride = item.begin; stride < item.end;) {
            start_partition();
            for (const Stride* end = partition_end(stride, item.end); stride < end; ++stride, now_ = !now_)
                take_block(*stride, stride + 1 < item.end ? find(head_, item.head, stride[1]) : find(claim()));
            end_partition(item.whole ? nullptr : partials + item.first_partial);
        }
        if (item.begin == item.end) claim();
        if (!item.whole) return;
        for (std::int64_t row = 0; row < rows_; ++row)
            finish<E>(space_.totals + row * shape_.record(), layer_, this->token_of(row), this->query_head_of(row));
    }

private:
    void start_partition() {
        std::fill(space_.tops, space_.tops + rows_, lowest);
        std::fill(space_.weight_sums, space_.weight_sums + rows_ * lanes, 0.0f);
        std::fill(space_.sums, space_.sums + rows_ * shape_.record(), 0.0f);
    }

    void end_partition(float* partials) {
        const std::int64_t columns = shape_.columns(), record = shape_.record();
        for (std::int64_t row = 0; row < rows_; ++row) {
            float* sums = space_.sums + row * record;
            sums[columns] = space_.tops[row];
            sums[columns + 1] = sum(load(space_.weight_sums + row * lanes));
            if (partials) std::copy(sums, sums + columns + 2, partials + row * record);
            else merge(space_.totals + row * record, sums, columns);
        }
    }

    // Where a block lies that will be read next.
    const Place* find(const Head<E>& head, std::int64_t number, const Stride& stride) {
        head.find(layer_.slots_of(stride, number), stride.native, space_.nothing, places_[!now_]);
        return &places_[!now_];
    }
    const Place* find(const Item* item) {
        return item && item->begin < item->end ? find(Head<E>(layer_, item->head), item->head, *item->begin) : nullptr;
    }

    void take_block(const Stride& stride, const Place* next) {
        if (bool(stride.native) != native_ || stride.pass != pass_) this->see(stride, 0, rows_);
        if constexpr (Base::multiplies_codes)
            if (!native_) return take_block(codes_, stride, next);
        take_block(numbers_, stride, next);
    }

    template <class Kind> void take_block(Kind& block, const Stride& stride, const Place* next) {
        const std::int32_t* slots = layer_.slots_of(stride, number_);
        const std::int64_t begin = stride.begin * shape_.group, end = stride.end * shape_.group;
        block.read({&head_, slots, native_, &places_[now_], next}, end - begin);
        if (seen_by_all(stride, slots) || block.finite()) return take_rows(block, stride.index, slots, begin, end);
        for (std::int64_t row = begin; row < end; ++row) take_row_alone(block, stride.index, slots, row);
    }

    bool seen_by_all(const Stride& stride, const std::int32_t* slots) const {
        int first = 0, last = block_positions - 1;
        while (first < last && slots[first] < 0) ++first;
        while (last > first && slots[last] < 0) --last;
        const std::int32_t low = stride.index * block_positions + first, high = stride.index * block_positions + last;
        return std::all_of(tokens_ + stride.begin, tokens_ + stride.end, [=](const Token& token) {
            const auto seen = this->seen_by(token);
            return seen.low <= low && seen.high >= high;
        });
    }

    // A weight of zero hides no infinite value, so a row that must not see one reads a block without it.
    template <class Kind> void take_row_alone(Kind& block, std::int32_t index, const std::int32_t* slots, std::int64_t row) {
        std::int32_t seen[block_positions];
        for (int i = 0; i < block_positions; ++i) {
            const std::int32_t position = index * block_positions + i;
            seen[i] = position < space_.low[row] || position > space_.high[row] ? -1 : slots[i];
        }
        Place place;
        head_.find(seen, native_, space_.nothing, place);
        block.read({&head_, seen, native_, &place, nullptr}, 1);
        take_rows(block, index, seen, row, row + 1);
    }

    template <class Kind>
    void take_rows(Kind& block, std::int32_t index, const std::int32_t* slots, std::int64_t begin, std::int64_t end) {
        const std::int32_t* gaps = has_gaps(slots) ? slots : nullptr;
        this->for_each_strip(block, index, begin, end, [&](std::int64_t row, int rows) { take_strip(block, index, gaps, row, rows); });
    }

    template <class Kind>
    void take_strip(Kind& block, std::int32_t index, const std::int32_t* slots, std::int64_t row, int rows) {
        float factors[lanes];
        this->score(block, slots, index, row, rows);
        raise_tops(row, rows, factors);
        for (int r = 0; r < rows; ++r) weigh(block, r, row + r, factors[r]);
        block.add_values(row, rows, factors);
    }

    // The running maxima; `factors` say by how much what was added up before must shrink.
    void raise_tops(std::int64_t row, int rows, float* factors) {
        float differences[lanes] = {};
        for (int r = 0; r < rows; ++r) {
            const float* x = space_.scores[r];
            const float top = highest(max(max(load(x), load(x + lanes)), max(load(x + 2 * lanes), load(x + 3 * lanes))));
            const float before = space_.tops[row + r];
            space_.tops[row + r] = std::max(before, top);
            differences[r] = before - space_.tops[row + r];
        }
        store(factors, power(load(differences)));
    }

    // Scores become weights.
    template <class Kind> void weigh(Kind& block, int r, std::int64_t row, float factor) {
        f32x16 x[block_vectors];
        unrolled<block_vectors>([&](auto v) KVLOOM_INLINE {
            x[v] = power(load(space_.scores[r] + v * lanes) - all(space_.tops[row]));
        });
        float* sums = space_.weight_sums + row * lanes;
        store(sums, fma(load(sums), all(factor), (x[0] + x[1]) + (x[2] + x[3])));
        block.keep_weights(r, x);
    }

    Place places_[2];  // of this block, and of the next
    int now_ = 0;
};

}  // namespace kvloom
