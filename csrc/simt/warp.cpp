// What the last lane of a collective computes for its warp. Operands lie in the frames of the lanes.
#include "simt/warp.h"

#include <cstdio>
#include <string>

namespace simt {
namespace {

struct ShuffleOperand {
  const char* name;
  Shuffle kind;
  int width;
  unsigned lane;
  uint64_t value, result;
};

struct VoteOperand {
  Vote kind;
  uint64_t value;
  unsigned result;
};

struct FoldOperand {
  Fold kind;
  bool is_signed;
  unsigned value, result;
};

template <typename T>
T& operand_of(void* const (&operands)[kWarpSize], int lane) {
  return *static_cast<T*>(operands[lane]);
}

template <typename F>
void for_each_lane(unsigned mask, const F& f) {
  for (unsigned rest = mask; rest != 0; rest &= rest - 1) f(std::countr_zero(rest));
}

std::string hex(unsigned mask) {
  char text[16];
  std::snprintf(text, sizeof(text), "0x%08x", mask);
  return text;
}

// The lane that `lane` reads, as PTX defines shfl.sync: its own where the other one is beyond its segment.
int source_of(Shuffle kind, int lane, unsigned operand, int width) {
  const int first = lane & -width, last = first + width - 1;
  const int by = int(operand & (kWarpSize - 1));
  switch (kind) {
    case Shuffle::kIndex:
      return first + (by & (width - 1));
    case Shuffle::kUp:
      return lane - by >= first ? lane - by : lane;
    case Shuffle::kDown:
      return lane + by <= last ? lane + by : lane;
    case Shuffle::kXor:
      return (lane ^ by) <= last ? lane ^ by : lane;
  }
  return lane;
}

void finish_shuffle(void* const (&operands)[kWarpSize], unsigned mask) {
  const int first_lane = std::countr_zero(mask);
  const ShuffleOperand& first = operand_of<ShuffleOperand>(operands, first_lane);
  for_each_lane(mask, [&](int lane) {
    ShuffleOperand& mine = operand_of<ShuffleOperand>(operands, lane);
    if (mine.width != first.width) {
      fail(std::string(mine.name) + ": lane " + std::to_string(first_lane) + " has width " +
           std::to_string(first.width) + ", but lane " + std::to_string(lane) + " has " + std::to_string(mine.width));
    }
    const int source = source_of(mine.kind, lane, mine.lane, mine.width);
    if ((mask >> source & 1) == 0) {
      fail(std::string(mine.name) + ": lane " + std::to_string(lane) + " reads lane " + std::to_string(source) +
           ", which is not in the mask " + hex(mask));
    }
    mine.result = operand_of<ShuffleOperand>(operands, source).value;
  });
}

void finish_vote(void* const (&operands)[kWarpSize], unsigned mask) {
  const auto lanes_with = [&](uint64_t value) {
    unsigned lanes = 0;
    for_each_lane(mask, [&](int lane) {
      if (operand_of<VoteOperand>(operands, lane).value == value) lanes |= 1u << lane;
    });
    return lanes;
  };
  const VoteOperand& first = operand_of<VoteOperand>(operands, std::countr_zero(mask));
  const unsigned common = lanes_with(first.kind == Vote::kMatchAll ? first.value : 1);
  for_each_lane(mask, [&](int lane) {
    VoteOperand& mine = operand_of<VoteOperand>(operands, lane);
    switch (mine.kind) {
      case Vote::kBallot:
        mine.result = common;
        break;
      case Vote::kAny:
        mine.result = common != 0;
        break;
      case Vote::kAll:
        mine.result = common == mask;
        break;
      case Vote::kMatchAny:
        mine.result = lanes_with(mine.value);
        break;
      case Vote::kMatchAll:
        mine.result = common == mask ? mask : 0;
        break;
    }
  });
}

unsigned fold_two(Fold kind, bool is_signed, unsigned a, unsigned b) {
  const bool less = is_signed ? int(b) < int(a) : b < a;
  switch (kind) {
    case Fold::kAdd:
      return a + b;
    case Fold::kMin:
      return less ? b : a;
    case Fold::kMax:
      return less ? a : b;
    case Fold::kAnd:
      return a & b;
    case Fold::kOr:
      return a | b;
    case Fold::kXor:
      return a ^ b;
  }
  return a;
}

void finish_fold(void* const (&operands)[kWarpSize], unsigned mask) {
  const FoldOperand& first = operand_of<FoldOperand>(operands, std::countr_zero(mask));
  unsigned result = first.value;
  for_each_lane(mask & (mask - 1), [&](int lane) {
    result = fold_two(first.kind, first.is_signed, result, operand_of<FoldOperand>(operands, lane).value);
  });
  for_each_lane(mask, [&](int lane) { operand_of<FoldOperand>(operands, lane).result = result; });
}

}  // namespace

uint64_t shuffle(const char* name, Shuffle kind, unsigned mask, uint64_t value, unsigned lane, int width, Site site) {
  if (width < 1 || width > kWarpSize || !std::has_single_bit(unsigned(width))) {
    fail(std::string(name) + ": expected width to be a power of two up to 32, but got " + std::to_string(width));
  }
  ShuffleOperand operand = {name, kind, width, lane, value, 0};
  collective(name, mask, &operand, finish_shuffle, site);
  return operand.result;
}

unsigned vote(const char* name, Vote kind, unsigned mask, uint64_t value, Site site) {
  VoteOperand operand = {kind, value, 0};
  collective(name, mask, &operand, finish_vote, site);
  return operand.result;
}

unsigned fold(const char* name, Fold kind, bool is_signed, unsigned mask, unsigned value, Site site) {
  FoldOperand operand = {kind, is_signed, value, 0};
  collective(name, mask, &operand, finish_fold, site);
  return operand.result;
}

}  // namespace simt
