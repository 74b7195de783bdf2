// What one thread does with an item of the work: block after block, for the rows of a set.
#pragma once

#include <algorithm>
#include <type_traits>

#include "blocks.h"
#include "division.h"
#include "softmax.h"
#include "workspace.h"

namespace kvloom {

template <class E> class Worker {
    using P = typename Arithmetic<E>::P;

public:
    Worker(const Layer& layer, char* memory)
        : layer_(layer), shape_(layer.shape), space_(shape_, layer.schedule.header->widest * shape_.group, layer.schedule.header->sealed, memory),
          head_(layer, 0), numbers_(shape_, space_), codes_(shape_, space_) {
        std::fill(space_.nothing, space_.nothing + std::max(shape_.key_dim, shape_.value_dim), P());
    }

    // `claim`: called when the last block is read, says which item this thread takes next, or null.
    template <class Claim> void run(const Item& item, float* partials, Claim claim) {
        tokens_ = layer_.schedule.tokens + item.set->first_token;
        rows_ = item.set->tokens * shape_.group;
        head_ = Head<E>(layer_, item.head);
        number_ = item.head;
        if (item.begin < item.end) {
            find(head_, *item.begin);
            now_ = !now_;
            take_queries(item.begin->pass);
            see(*item.begin);
        }
        if (item.whole)
            for (std::int64_t row = 0; row < rows_; ++row) clear(space_.totals + row * shape_.record(), shape_.columns());
        for (const Stride* stride = item.begin; stride < item.end;) {
            start_partition();
            for (const Stride* end = partition_end(stride, item.end); stride < end; ++stride, now_ = !now_)
                take_block(*stride, stride + 1 < item.end ? find(head_, stride[1]) : find(claim()));
            end_partition(item.whole ? nullptr : partials + item.first_partial);
        }
        if (item.begin == item.end) claim();
        if (!item.whole) return;
        for (std::int64_t row = 0; row < rows_; ++row)
            finish<E>(space_.totals + row * shape_.record(), layer_, tokens_[row / shape_.group], item.head * shape_.group + row % shape_.group);
    }

private:
    // The rows' queries, as they are in a pass.
    void take_queries(std::int32_t pass) {
        const std::int64_t stride = rounded_up(shape_.key_dim, depth<P>), padded = rounded_up(shape_.key_dim, integers_at_once);
        for (std::int64_t row = 0; row < rows_; ++row) {
            const Token& token = tokens_[row / shape_.group];
            const E* from = static_cast<const E*>(layer_.queries) + token.row * layer_.query_token_stride +
                            (number_ * shape_.group + row % shape_.group) * layer_.query_head_stride;
            if (turns(token, pass)) {
                E* turned = static_cast<E*>(static_cast<void*>(space_.turned));
                turn_back(from, shape_.key_dim, *layer_.turn, layer_.schedule.turns[token.turns + pass - 1], turned);
                from = turned;
            }
            P* to = space_.queries + row * stride;
            copy(from, shape_.key_dim, to);
            if (shape_.key_dim < stride) to[shape_.key_dim] = P();
            if constexpr (multiplies_codes)
                if (layer_.schedule.header->sealed) widen(from, shape_.key_dim, padded, space_.wide_queries + row * padded);
        }
        pass_ = pass;
        numbers_.begin();
    }

    bool turns(const Token& token, std::int32_t pass) const { return pass && token.turns >= 0 && layer_.turn; }

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

    const std::int32_t* slots_of(const Stride& stride) const {
        return layer_.schedule.slots + std::int64_t(stride.slots) * block_positions;
    }

    // Where a block lies that will be read next.
    const Place* find(const Head<E>& head, const Stride& stride) {
        head.find(slots_of(stride), stride.native, space_.nothing, places_[!now_]);
        return &places_[!now_];
    }
    const Place* find(const Item* item) {
        return item && item->begin < item->end ? find(Head<E>(layer_, item->head), *item->begin) : nullptr;
    }

    struct Seen { std::int32_t low, high; };  // both inclusive

    Seen seen_by(const Token& token) const {
        const Seen all = pass_ ? Seen{0, token.low - 1} : Seen{token.low, token.high};
        return native_ ? Seen{std::max(all.low, token.own), all.high} : Seen{all.low, std::min(all.high, token.own - 1)};
    }

    // From now on strides are like this one: of this pass, native or codes.
    void see(const Stride& stride) {
        if (stride.pass != pass_ && layer_.schedule.header->turns) take_queries(stride.pass);
        pass_ = stride.pass;
        native_ = stride.native;
        for (std::int64_t row = 0; row < rows_; ++row) {
            const Seen seen = seen_by(tokens_[row / shape_.group]);
            space_.low[row] = seen.low;
            space_.high[row] = seen.high;
        }
    }

    void take_block(const Stride& stride, const Place* next) {
        if (bool(stride.native) != native_ || stride.pass != pass_) see(stride);
        if constexpr (multiplies_codes)
            if (!native_) return take_block(codes_, stride, next);
        take_block(numbers_, stride, next);
    }

    template <class Kind> void take_block(Kind& block, const Stride& stride, const Place* next) {
        const std::int32_t* slots = slots_of(stride);
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
            const Seen seen = seen_by(token);
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

    // Rows in strips of nearly equal heights.
    template <class Kind>
    void take_rows(Kind& block, std::int32_t index, const std::int32_t* slots, std::int64_t begin, std::int64_t end) {
        const bool gaps = has_gaps(slots);
        const std::int64_t most = block.most_rows_for(end - begin);
        for (std::int64_t strips = (end - begin + most - 1) / most; begin < end; --strips) {
            const int rows = int((end - begin + strips - 1) / strips);
            if (sees_any(index, begin, rows)) take_strip(block, index, gaps ? slots : nullptr, begin, rows);
            begin += rows;
        }
    }

    bool sees_any(std::int32_t index, std::int64_t row, int rows) const {
        bool any = false;
        for (std::int64_t r = row; r < row + rows; ++r)
            any |= space_.low[r] < (index + 1) * block_positions && space_.high[r] >= index * block_positions;
        return any;
    }

    template <class Kind>
    void take_strip(Kind& block, std::int32_t index, const std::int32_t* slots, std::int64_t row, int rows) {
        float factors[lanes];
        block.score(row, rows);
        for (int r = 0; r < rows; ++r) finish_scores(space_.scores[r], slots, index, row + r);
        raise_tops(row, rows, factors);
        for (int r = 0; r < rows; ++r) weigh(block, r, row + r, factors[r]);
        block.add_values(row, rows, factors);
    }

    // Scales a row's scores, and hides what it does not see.
    void finish_scores(float* scores, const std::int32_t* slots, std::int32_t index, std::int64_t row) const {
        for (int v = 0; v < block_vectors; ++v) store(scores + v * lanes, scaled_score(load(scores + v * lanes)));
        hide(scores, slots, space_.low[row] - index * block_positions, space_.high[row] - index * block_positions);
    }

    f32x16 scaled_score(f32x16 x) const {
        if (layer_.softcap == 0) return x * all(layer_.scale * log2_e);
        return tanh(x * all(layer_.scale / layer_.softcap)) * all(layer_.softcap * log2_e);
    }

    // Minus infinity where a row sees nothing, outside of the columns `low` to `high`.
    static void hide(float* scores, const std::int32_t* slots, std::int32_t low, std::int32_t high) {
        if (low <= 0 && high >= block_positions - 1 && !slots) return;
        for (int i = 0; i < block_positions; ++i)
            if (i < low || i > high || (slots && slots[i] < 0)) scores[i] = -infinity;
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

    static constexpr bool multiplies_codes = std::is_same_v<E, bf16>;
    struct NoBlock { NoBlock(const Shape&, Workspace<P>&) {} };

    const Layer& layer_;
    const Shape& shape_;
    Workspace<P> space_;
    Head<E> head_;
    NumberBlock<E> numbers_;
    std::conditional_t<multiplies_codes, CodeBlock, NoBlock> codes_;
    const Token* tokens_ = nullptr;
    std::int64_t number_ = 0;  // of the head
    std::int64_t rows_ = 0;
    std::int32_t pass_ = 0;
    bool native_ = true;
    Place places_[2];  // of this block, and of the next
    int now_ = 0;
};

}  // namespace kvloom
