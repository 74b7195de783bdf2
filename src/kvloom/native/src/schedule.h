// What one step's attention reads in one layer group, as 32-bit numbers that every layer of the group shares.
//
// A block is 64 consecutive positions, from a multiple of 64 on, and the slots of the tokens held there. A set is up to
// a hundred or so new tokens whose sequences have blocks in common. A stride is a block and the tokens of a set that
// read it; strides of a set ascend by position.
//
// Where full blocks of the cache are sealed, a token reads what ended before its own block as codes and its own block
// natively. A block of positions then has two strides: first that of the codes, in which a token sees what lies before
// `own`, then the native one, in which it sees the rest, by slots of the step's own blocks.
//
// Where a token sees a window and some stretches before it, it reads in passes. In pass 0 it sees the positions from
// `low` on, in the others what stretches hold before `low`: a stride of these has slots of what is seen alone. Where
// stretches are seen at other distances each has a pass of its own, in which the token's query is turned back. Strides
// of a block follow each other by pass.
//
// A token that may not read all that it holds makes a choice, in each layer and for each key head anew (choose.h). It is
// a set of its own: first come strides of what it will choose, whose slots are written before attention, then those of
// what it reads in any case, whose positions count from behind the former.
#pragma once

#include <cstdint>

namespace kvloom {

constexpr int block_positions = 64;
constexpr int partition_blocks = 4;

struct Run { std::int32_t block, offset, count, first; };  // of the cache's blocks, as tables keep them

struct Header { std::int32_t sets, tokens, strides, blocks, widest, sealed, turns, shifts, choices, chosen, candidates; };
struct Set { std::int32_t first_token, tokens, first_stride, strides; };
// In the ragged row; the positions that it sees in pass 0, both inclusive; the first one of its own block, 0 if nothing
// is sealed; where its turns begin, of which there is one for each later pass, -1 if it is not turned.
struct Token { std::int32_t row, low, high, own, turns; };
// Position / 64; which slots, or ~which of those that are chosen; tokens of the set; whether the slots are native ones; in
// which pass they are read.
struct Stride { std::int32_t index, slots, begin, end, native, pass; };

// For the token of a row: how many of which of the candidates it takes, and where among the chosen slots these go.
struct Choice { std::int32_t row, take, first_candidate, candidates, first_block; };

// The parts of a schedule in the order in which they lie.
struct Schedule {
    const Header* header;
    const Set* sets;
    const Token* tokens;
    const Stride* strides;
    const std::int32_t* slots;   // 64 a block; -1 where no token is held
    const std::int32_t* turns;   // which of the shifts
    const std::int32_t* shifts;  // by how many tokens a query is turned back, each number once
    const Choice* choices;
    const std::int32_t* candidates;  // full blocks of the cache, ascending by position

    explicit Schedule(const std::int32_t* numbers)
        : header(reinterpret_cast<const Header*>(numbers)),
          sets(reinterpret_cast<const Set*>(header + 1)),
          tokens(reinterpret_cast<const Token*>(sets + header->sets)),
          strides(reinterpret_cast<const Stride*>(tokens + header->tokens)),
          slots(reinterpret_cast<const std::int32_t*>(strides + header->strides)),
          turns(slots + std::int64_t(header->blocks) * block_positions),
          shifts(turns + header->turns),
          choices(reinterpret_cast<const Choice*>(shifts + header->shifts)),
          candidates(reinterpret_cast<const std::int32_t*>(choices + header->choices)) {}
};

}  // namespace kvloom
