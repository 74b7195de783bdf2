// The rows of a set and their scores with a block of keys: what is seen of it, and how alike the two are.
#pragma once

#include <algorithm>
#include <type_traits>

#include "blocks.h"
#include "softmax.h"
#include "workspace.h"

namespace kvloom {

template <class E> class Scorer {
protected:
    using P = typename Arithmetic<E>::P;
    static constexpr bool multiplies_codes = std::is_same_v<E, bf16>;

    Scorer(const Layer& layer, char* memory)
        : layer_(layer), shape_(layer.shape), space_(shape_, layer.schedule.header->widest * shape_.group, layer.schedule.header->sealed, memory),
          head_(layer, 0), numbers_(shape_, space_), codes_(shape_, space_) {
        std::fill(space_.nothing, space_.nothing + std::max(shape_.key_dim, shape_.value_dim), P());
    }

    // From now on rows are those of this set, in one key head.
    void begin(const Set& set, std::int64_t head) {
        tokens_ = layer_.schedule.tokens + set.first_token;
        rows_ = set.tokens * shape_.group;
        head_ = Head<E>(layer_, head);
        number_ = head;
    }

    const Token& token_of(std::int64_t row) const { return tokens_[row / shape_.group]; }
    std::int64_t query_head_of(std::int64_t row) const { return number_ * shape_.group + row % shape_.group; }

    // The queries of some rows, as they are in a pass.
    void take_queries(std::int32_t pass, std::int64_t begin, std::int64_t end) {
        const std::int64_t stride = rounded_up(shape_.key_dim, depth<P>), padded = rounded_up(shape_.key_dim, integers_at_once);
        for (std::int64_t row = begin; row < end; ++row) {
            const Token& token = token_of(row);
            const E* from = static_cast<const E*>(layer_.queries) + token.row * layer_.query_token_stride +
                            query_head_of(row) * layer_.query_head_stride;
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

    // From now on strides are like this one, for some rows: of this pass, native or codes.
    void see(const Stride& stride, std::int64_t begin, std::int64_t end) {
        if (stride.pass != pass_ && layer_.schedule.header->turns) take_queries(stride.pass, begin, end);
        pass_ = stride.pass;
        native_ = stride.native;
        for (std::int64_t row = begin; row < end; ++row) {
            const Seen seen = seen_by(token_of(row));
            space_.low[row] = seen.low;
            space_.high[row] = seen.high;
        }
    }

    struct Seen { std::int32_t low, high; };  // both inclusive

    Seen seen_by(const Token& token) const {
        const Seen all = pass_ ? Seen{0, token.low - 1} : Seen{token.low, token.high};
        return native_ ? Seen{std::max(all.low, token.own), all.high} : Seen{all.low, std::min(all.high, token.own - 1)};
    }

    // Calls function(row, rows) for strips of nearly equal heights of rows that see anything of a block.
    template <class Kind, class Function>
    void for_each_strip(Kind& block, std::int32_t index, std::int64_t begin, std::int64_t end, Function function) {
        const std::int64_t most = block.most_rows_for(end - begin);
        for (std::int64_t strips = (end - begin + most - 1) / most; begin < end; --strips) {
            const int rows = int((end - begin + strips - 1) / strips);
            if (sees_any(index, begin, rows)) function(begin, rows);
            begin += rows;
        }
    }

    // The scores of a strip; `slots` is null if all of the block's positions hold tokens.
    template <class Kind>
    void score(Kind& block, const std::int32_t* slots, std::int32_t index, std::int64_t row, int rows) {
        block.score(row, rows);
        for (int r = 0; r < rows; ++r) finish_scores(space_.scores[r], slots, index, row + r);
    }

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

private:
    bool turns(const Token& token, std::int32_t pass) const { return pass && token.turns >= 0 && layer_.turn; }

    bool sees_any(std::int32_t index, std::int64_t row, int rows) const {
        bool any = false;
        for (std::int64_t r = row; r < row + rows; ++r)
            any |= space_.low[r] < (index + 1) * block_positions && space_.high[r] >= index * block_positions;
        return any;
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
};

}  // namespace kvloom
