// Non-maximum suppression on CUDA. The boxes of an image in order of score are cut in blocks of 2048. Block after
// block, in two launches for all images: CTAs compare all pairs within the block (a bit each, 64 x 64 tiles), and all
// boxes from it on with those that the block before has kept; then one CTA an image decides which boxes of the block
// stay. The number of launches depends on N alone, and nothing waits for the host.
#include <algorithm>

#include "core/dispatch.cuh"
#include "core/launch.h"
#include "core/math.h"
#include "core/warp.cuh"
#include "ops/nms/boxes.cuh"
#include "ops/nms/nms.h"
#include "ops/nms/soft.cuh"

namespace pvk::nms {
namespace {

constexpr int kChunk = 64;        // boxes a mask word holds
constexpr int kBlockChunks = 32;  // chunks a block holds: one warp of the resolving CTA each
constexpr int kBlock = kChunk * kBlockChunks;
constexpr int kThreads = 256;
constexpr int kSlice = kThreads;  // kept boxes, and later boxes, that one CTA compares
constexpr int kSlices = kBlock / kSlice;
constexpr unsigned kClearBlocks = 8;  // CTAs an image

// The device's scratch, in this order. Tiles (row chunk, column chunk) of the current block with row <= column lie row
// after row, one word for each of a tile's 64 rows.
struct Scratch {
  int64_t* kept_begin;  // [B]: where in `keep` the latest block's boxes begin; they end at `count`
  uint64_t* removed;    // [B, ceil(N / 64)]: a bit for every box that is absent, or that a kept one suppressed
  uint64_t* tiles;      // [B, tiles of a block, 64]
};

PVK_HOST_DEVICE int64_t count_tiles(int64_t chunks) {
  return chunks * (chunks + 1) / 2;
}

PVK_HOST_DEVICE int64_t removed_words(int64_t N) {
  return ceil_div(N, int64_t(kChunk));
}

PVK_HOST_DEVICE int64_t tile_words(int64_t N) {
  return count_tiles(min_of(removed_words(N), int64_t(kBlockChunks))) * kChunk;
}

// Of one image.
PVK_DEVICE Scratch find_scratch(const NmsParams& p, int64_t image) {
  int64_t* const begin = static_cast<int64_t*>(p.scratch);
  uint64_t* const removed = reinterpret_cast<uint64_t*>(begin + p.B);
  uint64_t* const tiles = removed + p.B * removed_words(p.N);
  return {begin + image, removed + image * removed_words(p.N), tiles + image * tile_words(p.N)};
}

PVK_DEVICE uint64_t* find_tile(uint64_t* tiles, int chunks, int row, int column) {
  return tiles + (row * chunks - row * (row - 1) / 2 + column - row) * kChunk;
}

PVK_HOST_DEVICE int chunks_of_block(int64_t N, int64_t first) {
  return int(ceil_div(min_of(N - first, int64_t(kBlock)), int64_t(kChunk)));
}

PVK_HOST_DEVICE int64_t count_suppressing(int64_t N, int64_t first) {
  return first == 0 ? 0 : ceil_div(N - first, int64_t(kThreads)) * kSlices;
}

// The index of the box at a place in the order of an image.
PVK_DEVICE int64_t index_at(const NmsParams& p, int64_t image, int64_t place) {
  return __ldg(p.order + image * p.order_stride[0] + place * p.order_stride[1]);
}

PVK_DEVICE bool is_absent(const NmsParams& p, int64_t image, int64_t place) {
  if (!p.padded) return false;
  const int64_t at = image * p.scores_stride[0] + index_at(p, image, place) * p.scores_stride[1];
  return load_score<double>(p.scores, p.dtype, at) == -__builtin_inf();
}

// Whether nothing from this place on can be kept.
PVK_DEVICE bool is_done(const NmsParams& p, int64_t image, int64_t place) {
  return p.count[image] >= p.max_output || is_absent(p, image, place);
}

// A box, with what it is compared by.
template <typename T>
struct Candidate {
  Box<T> box;
  T area;
  uint64_t group;
};

template <typename T>
PVK_DEVICE Candidate<T> load_candidate(const NmsParams& p, int64_t image, int64_t index) {
  const int64_t at = image * p.boxes_stride[0] + index * p.boxes_stride[1];
  const Box<T> box = load_box<T>(p.boxes, p.dtype, at, p.boxes_stride[2]);
  const uint64_t group = p.groups == nullptr ? 0
                                             : load_group(p.groups, p.group_bytes,
                                                          image * p.groups_stride[0] + index * p.groups_stride[1]);
  return {box, area_of(box), group};
}

// Candidates in shared memory.
template <typename T>
struct Stage {
  Box<T> boxes[kThreads];
  T areas[kThreads];
  uint64_t groups[kThreads];

  PVK_DEVICE void put(int i, const Candidate<T>& candidate) {
    boxes[i] = candidate.box;
    areas[i] = candidate.area;
    groups[i] = candidate.group;
  }
};

// A thread owns every 2048th place of an image: its bit of `removed`, and its part of the padding.
__global__ void __launch_bounds__(kThreads) nms_clear_kernel(const __grid_constant__ NmsParams p) {
  const int64_t image = blockIdx.x / kClearBlocks;
  const int64_t begin = blockIdx.x % kClearBlocks * kThreads + threadIdx.x;
  const Scratch scratch = find_scratch(p, image);
  for (int64_t place = begin; place / kChunk < removed_words(p.N); place += kClearBlocks * kThreads) {
    const unsigned absent = ballot(place < p.N && is_absent(p, image, place));
    if (place % kWarpSize == 0) reinterpret_cast<unsigned*>(scratch.removed)[place / kWarpSize] = absent;
  }
  if (p.padded)
    for (int64_t i = begin; i < p.max_output; i += kClearBlocks * kThreads) p.keep[image * p.max_output + i] = -1;
  if (begin == 0) *scratch.kept_begin = p.count[image] = 0;
}

// One tile: 64 rows (earlier boxes) by 64 columns (later ones). A thread owns a row and 16 columns, so that a warp
// reads one column at a time, broadcast.
template <typename T>
PVK_DEVICE void find_pairs(const NmsParams& p, int64_t image, const Scratch& scratch, int64_t first, int row_chunk,
                           int column_chunk, Stage<T>& stage) {
  constexpr int kColumns = kChunk * kChunk / kThreads;
  [[maybe_unused]] constexpr int kUnroll = sizeof(T) == sizeof(float) ? kColumns : 1;  // doubles would spill
  const int64_t first_row = first + row_chunk * kChunk, first_column = first + column_chunk * kChunk;
  const int columns = int(min_of(p.N - first_column, int64_t(kChunk)));
  if (int(threadIdx.x) < columns) {
    stage.put(threadIdx.x, load_candidate<T>(p, image, index_at(p, image, first_column + threadIdx.x)));
  }
  __syncthreads();

  const int row = threadIdx.x % kChunk, part = threadIdx.x / kChunk;
  if (first_row + row >= p.N) return;
  const Candidate<T> mine = load_candidate<T>(p, image, index_at(p, image, first_row + row));
  unsigned bits = 0;
#pragma unroll kUnroll
  for (int i = 0; i < kColumns; ++i) {
    const int column = part * kColumns + i;
    if (column >= columns || first_column + column <= first_row + row) continue;
    if (stage.groups[column] != mine.group) continue;
    if (suppresses(mine.box, mine.area, stage.boxes[column], stage.areas[column], p.iou_threshold)) bits |= 1u << i;
  }
  uint64_t* const tile = find_tile(scratch.tiles, chunks_of_block(p.N, first), row_chunk, column_chunk);
  reinterpret_cast<uint16_t*>(tile + row)[part] = uint16_t(bits);
}

// A thread owns one later box; the CTA compares 256 of them with a slice of the boxes that the block before has kept,
// broadcast from shared memory, and sets the bits of those that one suppresses. A warp stops once all its boxes are
// gone.
template <typename T>
PVK_DEVICE void suppress_later(const NmsParams& p, int64_t image, const Scratch& scratch, int64_t first_later,
                               int slice, Stage<T>& stage) {
  constexpr int kStep = 8;
  const int64_t slice_begin = *scratch.kept_begin + int64_t(slice) * kSlice;
  const int count = int(min_of(p.count[image] - slice_begin, int64_t(kSlice)));
  if (count <= 0) return;
  const int64_t j = first_later + threadIdx.x;
  unsigned* const removed = reinterpret_cast<unsigned*>(scratch.removed) + j / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;

  if (int(threadIdx.x) < count) {
    const int64_t index = p.keep[image * p.max_output + slice_begin + threadIdx.x];
    stage.put(threadIdx.x, load_candidate<T>(p, image, index));
  }
  bool alive = j < p.N && !(load_relaxed(removed) >> lane & 1);
  Candidate<T> mine = {};
  if (alive) mine = load_candidate<T>(p, image, index_at(p, image, j));
  __syncthreads();

  bool suppressed = false;
  for (int i = 0; i < count && ballot(alive) != 0; i += kStep) {
#pragma unroll
    for (int u = 0; u < kStep; ++u) {
      if (i + u < count && alive && stage.groups[i + u] == mine.group) {
        suppressed = suppresses(stage.boxes[i + u], stage.areas[i + u], mine.box, mine.area, p.iou_threshold);
        alive = !suppressed;
      }
    }
  }
  const unsigned gone = ballot(suppressed);
  if (lane == 0 && gone != 0) atomicOr(removed, gone);
}

// CTAs image after image: first those that compare the boxes from place `first` on with what the block before has kept,
// then one for each tile of the block that begins there.
template <typename T>
__global__ void __launch_bounds__(kThreads) nms_compare_kernel(const __grid_constant__ NmsParams p, int64_t first) {
  SIMT_SHARED(Stage<T>, stage);
  const int chunks = chunks_of_block(p.N, first);
  const unsigned suppressing = unsigned(count_suppressing(p.N, first)), items = suppressing + chunks * chunks;
  const unsigned image = blockIdx.x / items, item = blockIdx.x % items;
  const Scratch scratch = find_scratch(p, image);
  const bool suppresses_later = item < suppressing;
  const int tile = int(item - suppressing), row = tile / chunks, column = tile % chunks;
  if (!suppresses_later && row > column) return;
  const int64_t first_later = first + (suppresses_later ? int64_t(item / kSlices) * kThreads : row * kChunk);
  if (is_done(p, image, first_later)) return;
  if (suppresses_later) {
    suppress_later<T>(p, image, scratch, first_later, int(item % kSlices), stage);
  } else {
    find_pairs<T>(p, image, scratch, first, row, column, stage);
  }
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

// One CTA an image. Warp w owns chunk w of the block: its word of `removed`, in a register. Chunk after chunk, the
// owner decides its 64 boxes and publishes the kept ones; every later warp ORs their rows of its own tile, loaded a
// step ahead. It ends early once max_output boxes are kept.
__global__ void __launch_bounds__(kWarpSize* kBlockChunks)
    nms_resolve_kernel(const __grid_constant__ NmsParams p, int64_t first) {
  SIMT_SHARED(uint64_t[kBlockChunks], kept);
  const int64_t image = blockIdx.x;
  if (is_done(p, image, first)) return;
  const Scratch scratch = find_scratch(p, image);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int chunks = chunks_of_block(p.N, first);
  const int64_t first_row = first + warp * kChunk;
  const int64_t kept_begin = p.count[image], wanted = p.max_output - kept_begin;
  uint64_t removed = warp < chunks ? scratch.removed[first_row / kChunk] : 0;

  // Rows `lane` and `lane + 32` of tile (row chunk, warp).
  uint64_t low_row = 0, high_row = 0;
  const auto load_rows = [&](int row_chunk) {
    if (warp < row_chunk || warp >= chunks) return;
    const uint64_t* const tile = find_tile(scratch.tiles, chunks, row_chunk, warp);
    const int64_t rows = p.N - (first + row_chunk * kChunk);
    low_row = lane < rows ? tile[lane] : 0;
    high_row = lane + 32 < rows ? tile[lane + 32] : 0;
  };
  load_rows(0);
  int64_t found = 0;
  int decided = 0;
  while (decided < chunks && found < wanted) {
    const int chunk = decided++;
    const uint64_t low = low_row, high = high_row;
    if (decided < chunks) load_rows(decided);
    if (warp == chunk) {
      const int64_t rows = p.N - first_row;
      const uint64_t real = rows >= kChunk ? ~uint64_t(0) : bits_below64(int(rows));
      const uint64_t stay = resolve_chunk(low, high, removed, real, lane);
      if (lane == 0) kept[chunk] = stay;
    }
    __syncthreads();
    const uint64_t stay = kept[chunk];
    found += __popcll(stay);
    if (warp > chunk) removed |= reduce_or((stay >> lane & 1 ? low : 0) | (stay >> lane >> 32 & 1 ? high : 0));
  }

  const unsigned count = lane < decided ? __popcll(kept[lane]) : 0;
  const int64_t before = reduce_add(lane < warp ? count : 0);
  if (warp < decided) {
    const uint64_t stay = kept[warp];
#pragma unroll
    for (int row = lane; row < kChunk; row += kWarpSize) {
      const int64_t rank = before + __popcll(stay & bits_below64(row));
      if ((stay >> row & 1) && rank < wanted) {
        p.keep[image * p.max_output + kept_begin + rank] = index_at(p, image, first_row + row);
      }
    }
  }
  if (threadIdx.x == 0) {
    *scratch.kept_begin = kept_begin;
    p.count[image] = kept_begin + min_of(found, wanted);
  }
}

template <typename T>
void forward(const NmsParams& p, Stream stream) {
  launch(nms_clear_kernel, {dim3(unsigned(p.B * kClearBlocks)), dim3(kThreads), 0, stream}, p);
  for (int64_t first = 0; first < p.N; first += kBlock) {
    const int64_t chunks = chunks_of_block(p.N, first);
    const int64_t items = count_suppressing(p.N, first) + chunks * chunks;
    launch(nms_compare_kernel<T>, {dim3(unsigned(p.B * items)), dim3(kThreads), 0, stream}, p, first);
    launch(nms_resolve_kernel, {dim3(unsigned(p.B)), dim3(kWarpSize * kBlockChunks), 0, stream}, p, first);
  }
}

}  // namespace

bool sorts_scores() {
  return false;
}

// At most N * N / 8 + N * 8 + 528 bytes an image, and no more than N / 8 + 270,352.
int64_t scratch_bytes(int64_t B, int64_t N) {
  return B * (1 + removed_words(N) + tile_words(N)) * int64_t(sizeof(uint64_t));
}

void forward(const NmsParams& p, Stream stream) {
  if (p.dtype == DType::kFloat64) return forward<double>(p, stream);
  forward<float>(p, stream);
}

int64_t soft_scratch_bytes(int64_t N, DType dtype) {
  return dtype == DType::kFloat64 ? soft_scratch_bytes<double>(N) : soft_scratch_bytes<float>(N);
}

void soft_decay(const SoftNmsParams& p, Stream stream) {
  if (p.dtype == DType::kFloat64) return soft_decay<double>(p, stream);
  soft_decay<float>(p, stream);
}

void soft_finish(const SoftNmsParams& p, Stream stream) {
  const dim3 grid(unsigned(ceil_div(p.N, int64_t(kSoftThreads))));
  dispatch_dtype(p.dtype, [&]<typename scalar_t>() {
    launch(nms_soft_finish_kernel<scalar_t>, {grid, dim3(kSoftThreads), 0, stream}, p);
  });
}

int64_t read_count(const int64_t* count, Stream stream) {
  return read_back(count, stream);
}

}  // namespace pvk::nms
