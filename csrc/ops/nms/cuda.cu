// Non-maximum suppression on CUDA. Boxes in order of score are cut in blocks of 2048. One launch finds, for every pair
// within a block, whether one would suppress the other (a bit each, 64 x 64 tiles). Then block after block: one CTA
// decides which of its boxes stay, and all later boxes are compared with those. Two launches a block, O(N) scratch, and
// one synchronisation, to read the count.
#include <algorithm>

#include "core/dispatch.cuh"
#include "core/launch.h"
#include "core/math.h"
#include "core/warp.cuh"
#include "ops/nms/nms.h"

namespace pvk::nms {
namespace {

constexpr int kChunk = 64;        // boxes a mask word holds
constexpr int kBlockChunks = 32;  // chunks a block holds: one warp of the resolving CTA each
constexpr int kBlock = kChunk * kBlockChunks;
constexpr int kTileWords = kChunk;  // a tile of pairs: one word for each of its 64 rows
constexpr int kSlice = 256;         // kept boxes that one CTA of suppress compares with
constexpr int kThreads = 256;

// The device's scratch, in this order. Tiles (row chunk, column chunk) with row <= column lie row after row; the last
// tile of the last block holds only its real rows.
struct Scratch {
  int64_t* kept_range;  // [2]: the part of `keep` that the latest block wrote
  uint64_t* removed;    // [ceil(N / 64)]: a bit for every box that a kept one suppressed
  uint64_t* tiles;
};

PVK_HOST_DEVICE int64_t count_tiles(int64_t chunks) {
  return chunks * (chunks + 1) / 2;
}

PVK_HOST_DEVICE Scratch find_scratch(void* scratch, int64_t N) {
  int64_t* const range = static_cast<int64_t*>(scratch);
  uint64_t* const removed = reinterpret_cast<uint64_t*>(range + 2);
  return {range, removed, removed + ceil_div(N, int64_t(kChunk))};
}

// The words of tile (row, column) of a block whose first box is `first`.
PVK_DEVICE uint64_t* find_tile(uint64_t* tiles, int64_t first, int chunks, int row, int column) {
  const int64_t before = first / kBlock * count_tiles(kBlockChunks);
  return tiles + (before + row * chunks - row * (row - 1) / 2 + column - row) * kTileWords;
}

PVK_DEVICE int chunks_of_block(int64_t N, int64_t first) {
  return int(ceil_div(min_of(N - first, int64_t(kBlock)), int64_t(kChunk)));
}

template <typename T>
struct alignas(16) Box {
  T x1, y1, x2, y2;
};

template <typename T>
PVK_DEVICE Box<T> load_box(const NmsParams& p, int64_t index) {
  T corner[4];
  load_strided(p.boxes, p.dtype, index * p.boxes_stride[0], p.boxes_stride[1], corner);
  return {corner[0], corner[1], corner[2], corner[3]};
}

template <typename T>
PVK_DEVICE T area_of(const Box<T>& box) {
  return mul_rn(sub_rn(box.x2, box.x1), sub_rn(box.y2, box.y1));
}

// Whether box i, which comes first, suppresses box j. The order of the operands decides where NaN goes.
template <typename T>
PVK_DEVICE bool suppresses(const Box<T>& i, T i_area, const Box<T>& j, T j_area, double iou_threshold) {
  const T w = max_of(T(0), sub_rn(min_of(i.x2, j.x2), max_of(i.x1, j.x1)));
  const T h = max_of(T(0), sub_rn(min_of(i.y2, j.y2), max_of(i.y1, j.y1)));
  const T inter = mul_rn(w, h);
  // Then the quotient is 0 or NaN: no division.
  if (!(inter > T(0)) && iou_threshold >= 0) return false;
  return double(div_rn(inter, sub_rn(add_rn(i_area, j_area), inter))) > iou_threshold;
}

// A CTA owns one tile: 64 rows (earlier boxes) by 64 columns (later ones) of block blockIdx.x. A thread owns a row and
// 16 columns, so that a warp reads one column at a time, broadcast. The tiles on the diagonal also clear `removed`.
template <typename T>
__global__ void __launch_bounds__(kThreads) nms_mask_kernel(const __grid_constant__ NmsParams p) {
  constexpr int kColumns = kChunk * kChunk / kThreads;
  SIMT_SHARED(Box<T>[kChunk], boxes);
  SIMT_SHARED(T[kChunk], areas);
  const int64_t first = int64_t(blockIdx.x) * kBlock;
  const int chunks = chunks_of_block(p.N, first);
  const int row_chunk = blockIdx.y, column_chunk = blockIdx.z;
  if (column_chunk >= chunks || row_chunk > column_chunk) return;
  const Scratch scratch = find_scratch(p.scratch, p.N);
  const int64_t first_row = first + row_chunk * kChunk, first_column = first + column_chunk * kChunk;
  const int columns = int(min_of(p.N - first_column, int64_t(kChunk)));

  if (int(threadIdx.x) < columns) {
    const Box<T> box = load_box<T>(p, p.order[first_column + threadIdx.x]);
    boxes[threadIdx.x] = box;
    areas[threadIdx.x] = area_of(box);
  }
  if (threadIdx.x == 0 && row_chunk == column_chunk) {
    scratch.removed[first_row / kChunk] = 0;
    if (first_row == 0) scratch.kept_range[0] = scratch.kept_range[1] = 0;
  }
  __syncthreads();

  const int row = threadIdx.x % kChunk, part = threadIdx.x / kChunk;
  if (first_row + row >= p.N) return;
  const Box<T> mine = load_box<T>(p, p.order[first_row + row]);
  const T my_area = area_of(mine);
  unsigned bits = 0;
  for (int i = 0; i < kColumns; ++i) {
    const int column = part * kColumns + i;
    if (column >= columns || first_column + column <= first_row + row) continue;
    if (suppresses(mine, my_area, boxes[column], areas[column], p.iou_threshold)) bits |= 1u << i;
  }
  uint64_t* const tile = find_tile(scratch.tiles, first, chunks, row_chunk, column_chunk);
  reinterpret_cast<uint16_t*>(tile + row)[part] = uint16_t(bits);
}

// The rows of one chunk that stay, of those not in `removed`. Each round keeps the rows that no kept or undecided row
// suppresses, and drops those that a kept row does: the first undecided row never waits, so at most 64 rounds.
PVK_DEVICE uint64_t resolve_chunk(uint64_t low_row, uint64_t high_row, uint64_t removed, uint64_t real, int lane) {
  uint64_t kept = 0, undecided = real & ~removed;
  while (undecided != 0) {
    const uint64_t blocked =
        reduce_or((undecided >> lane & 1 ? low_row : 0) | (undecided >> lane >> 32 & 1 ? high_row : 0));
    const uint64_t stay = undecided & ~blocked;
    const uint64_t dropped = reduce_or((stay >> lane & 1 ? low_row : 0) | (stay >> lane >> 32 & 1 ? high_row : 0));
    kept |= stay;
    undecided &= ~stay & ~dropped;
  }
  return kept;
}

// One CTA. Warp w owns chunk w of the block: its word of `removed`, in a register. Chunk after chunk, the owner decides
// its 64 boxes and publishes the kept ones; every later warp ORs their rows of its own tile, loaded a step ahead.
__global__ void __launch_bounds__(kWarpSize* kBlockChunks)
    nms_resolve_kernel(const __grid_constant__ NmsParams p, int64_t first) {
  SIMT_SHARED(uint64_t[kBlockChunks], kept);
  const Scratch scratch = find_scratch(p.scratch, p.N);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int chunks = chunks_of_block(p.N, first);
  const int64_t first_row = first + warp * kChunk;
  const int64_t kept_begin = scratch.kept_range[1];
  uint64_t removed = warp < chunks ? scratch.removed[first_row / kChunk] : 0;

  // Rows `lane` and `lane + 32` of tile (row chunk, warp).
  uint64_t low_row = 0, high_row = 0;
  const auto load_rows = [&](int row_chunk) {
    if (warp < row_chunk || warp >= chunks) return;
    const uint64_t* const tile = find_tile(scratch.tiles, first, chunks, row_chunk, warp);
    const int64_t rows = p.N - (first + row_chunk * kChunk);
    low_row = lane < rows ? tile[lane] : 0;
    high_row = lane + 32 < rows ? tile[lane + 32] : 0;
  };
  load_rows(0);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const uint64_t low = low_row, high = high_row;
    if (chunk + 1 < chunks) load_rows(chunk + 1);
    if (warp == chunk) {
      const int64_t rows = p.N - first_row;
      const uint64_t real = rows >= kChunk ? ~uint64_t(0) : bits_below64(int(rows));
      const uint64_t stay = resolve_chunk(low, high, removed, real, lane);
      if (lane == 0) kept[chunk] = stay;
    }
    __syncthreads();
    if (warp > chunk) {
      const uint64_t stay = kept[chunk];
      removed |= reduce_or((stay >> lane & 1 ? low : 0) | (stay >> lane >> 32 & 1 ? high : 0));
    }
  }

  const unsigned count = lane < chunks ? __popcll(kept[lane]) : 0;
  const int64_t before = kept_begin + reduce_add(lane < warp ? count : 0);
  const int64_t total = reduce_add(count);
  if (warp < chunks) {
    const uint64_t stay = kept[warp];
#pragma unroll
    for (int row = lane; row < kChunk; row += kWarpSize) {
      if (stay >> row & 1) p.keep[before + __popcll(stay & bits_below64(row))] = p.order[first_row + row];
    }
  }
  if (threadIdx.x == 0) {
    scratch.kept_range[0] = kept_begin;
    scratch.kept_range[1] = kept_begin + total;
  }
}

// A thread owns one box behind the block, a CTA compares 256 of them with a slice of the block's kept boxes, broadcast
// from shared memory, and sets the bits of those that one suppresses. A warp stops once all its boxes are gone.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    nms_suppress_kernel(const __grid_constant__ NmsParams p, int64_t first_later) {
  constexpr int kStep = 8;
  SIMT_SHARED(Box<T>[kSlice], boxes);
  SIMT_SHARED(T[kSlice], areas);
  static_assert(kSlice == kThreads);
  const Scratch scratch = find_scratch(p.scratch, p.N);
  const int64_t slice_begin = scratch.kept_range[0] + int64_t(blockIdx.y) * kSlice;
  const int count = int(min_of(scratch.kept_range[1] - slice_begin, int64_t(kSlice)));
  if (count <= 0) return;
  const int64_t j = first_later + int64_t(blockIdx.x) * kThreads + threadIdx.x;
  unsigned* const removed = reinterpret_cast<unsigned*>(scratch.removed) + j / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;

  if (int(threadIdx.x) < count) {
    const Box<T> box = load_box<T>(p, p.keep[slice_begin + threadIdx.x]);
    boxes[threadIdx.x] = box;
    areas[threadIdx.x] = area_of(box);
  }
  bool alive = j < p.N && !(load_relaxed(removed) >> lane & 1);
  Box<T> mine = {};
  if (alive) mine = load_box<T>(p, p.order[j]);
  const T my_area = area_of(mine);
  __syncthreads();

  bool suppressed = false;
  for (int i = 0; i < count && ballot(alive) != 0; i += kStep) {
#pragma unroll
    for (int u = 0; u < kStep; ++u) {
      if (i + u < count && alive) {
        suppressed = suppresses(boxes[i + u], areas[i + u], mine, my_area, p.iou_threshold);
        alive = !suppressed;
      }
    }
  }
  const unsigned gone = ballot(suppressed);
  if (lane == 0 && gone != 0) atomicOr(removed, gone);
}

template <typename T>
int64_t forward(const NmsParams& p, Stream stream) {
  const int64_t blocks = ceil_div(p.N, int64_t(kBlock));
  const unsigned chunks = unsigned(ceil_div(std::min<int64_t>(p.N, kBlock), int64_t(kChunk)));
  launch(nms_mask_kernel<T>, {dim3(unsigned(blocks), chunks, chunks), dim3(kThreads), 0, stream}, p);
  for (int64_t first = 0; first < p.N; first += kBlock) {
    launch(nms_resolve_kernel, {dim3(1), dim3(kWarpSize * kBlockChunks), 0, stream}, p, first);
    const int64_t first_later = first + kBlock;
    if (first_later >= p.N) break;
    const dim3 grid(unsigned(ceil_div(p.N - first_later, int64_t(kThreads))), kBlock / kSlice);
    launch(nms_suppress_kernel<T>, {grid, dim3(kThreads), 0, stream}, p, first_later);
  }
  return read_back(find_scratch(p.scratch, p.N).kept_range + 1, stream);
}

}  // namespace

// At most N * N / 8 + 536 bytes, and about 132 bytes a box where N is large.
int64_t scratch_bytes(int64_t N, DType) {
  if (N == 0) return 0;
  const int64_t blocks = N / kBlock, rest = N % kBlock;
  const int64_t chunks = ceil_div(rest, int64_t(kChunk));
  int64_t words = 2 + ceil_div(N, int64_t(kChunk)) + blocks * count_tiles(kBlockChunks) * kTileWords;
  if (rest > 0) words += (count_tiles(chunks) - 1) * kTileWords + (rest - (chunks - 1) * kChunk);
  return words * int64_t(sizeof(uint64_t));
}

int64_t forward(const NmsParams& p, Stream stream) {
  if (p.N == 0) return 0;
  return p.dtype == DType::kFloat64 ? forward<double>(p, stream) : forward<float>(p, stream);
}

}  // namespace pvk::nms
