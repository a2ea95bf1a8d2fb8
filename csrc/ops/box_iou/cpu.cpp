// Pairwise overlap of boxes on the CPU: a row of the output is one box against kLanes others at a time.
//
// Both sets are first laid out number by number, with what a box needs only once: its area, centre and angle. The
// backward cuts the pairs into tiles of fixed size; each leaves sums for its rows and its columns, which are added in
// order, so that the result does not depend on the number of threads. Within a tile, sums are of sums of kCascade.
#include "core/buffer.h"
#include "core/dispatch.h"
#include "core/isa.h"
#include "core/parallel.h"
#include "ops/box_iou/box_iou.h"
#include "ops/box_iou/simd_boxes.h"

namespace pvk::box_iou {
namespace PVK_ISA {
namespace {

constexpr int64_t kTileColumns = 1024;
constexpr int64_t kForwardRows = 64, kBackwardRows = 256;  // of a tile, at most
constexpr int64_t kBackwardTiles = 16;                     // so many at least, where there are rows enough
constexpr int64_t kPiecePairs = 1 << 15;                   // less is not worth a thread
constexpr int64_t kPieceBoxes = 1 << 12;
constexpr int kRowsAtOnce = 4;
constexpr int64_t kCascade = 16;  // numbers that are added up before their sum is

PVK_INLINE int64_t round_up(int64_t count, int64_t multiple) {
  return ceil_div(count, multiple) * multiple;
}

// fields[b][field][pitch]
template <typename T>
struct Fields {
  Buffer<T> data;
  int64_t pitch, fields;

  Fields(int64_t batches, int64_t fields_, int64_t count)
      : data(batches * fields_ * round_up(count, kLanes<T>)), pitch(round_up(count, kLanes<T>)), fields(fields_) {}
  T* of(int64_t batch) { return data.data() + batch * fields * pitch; }
};

// body(batch, begin, end) over the boxes of all batches.
template <typename Body>
void each_range(int64_t batches, int64_t count, const Body& body) {
  const int64_t ranges = ceil_div(count, kPieceBoxes);
  const int64_t together = max_of(int64_t(1), kPieceBoxes / max_of(count, int64_t(1)));
  parallel_for(batches * ranges, together, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t first = piece % ranges * kPieceBoxes;
      body(piece / ranges, first, min_of(first + kPieceBoxes, count));
    }
  });
}

template <typename scalar_t, Kind kKind, typename T>
void prepare(const void* boxes, const int64_t (&stride)[3], int64_t batches, int64_t count, Format format,
             const Constants<Vec<T>>& constants, Fields<T>& out) {
  each_range(batches, count, [&](int64_t batch, int64_t begin, int64_t end) {
    const scalar_t* source = static_cast<const scalar_t*>(boxes) + batch * stride[0];
    T* const fields = out.of(batch);
    const int64_t pitch = out.pitch;
    for (int64_t i = begin; i < end; i += kLanes<T>) {
      Vec<T> c[4];
      load_boxes<scalar_t, T>(source + i * stride[1], stride[1], stride[2], end - i, c);
      const Box<Vec<T>> box = prepare_box<kKind, T>(format, c, constants);
      store(fields + i, box.x1);
      store(fields + pitch + i, box.y1);
      store(fields + 2 * pitch + i, box.x2);
      store(fields + 3 * pitch + i, box.y2);
      store(fields + 4 * pitch + i, box.area);
      if constexpr (kKind >= Kind::kDistance) {
        store(fields + 5 * pitch + i, box.cx);
        store(fields + 6 * pitch + i, box.cy);
      }
      if constexpr (kKind == Kind::kComplete) store(fields + 7 * pitch + i, box.angle);
    }
  });
}

// kLanes boxes, or one in every lane.
template <Kind kKind, typename T, typename Get>
PVK_INLINE Box<Vec<T>> get_box(const T* fields, int64_t pitch, const Get& get) {
  Box<Vec<T>> box;
  box.x1 = get(fields);
  box.y1 = get(fields + pitch);
  box.x2 = get(fields + 2 * pitch);
  box.y2 = get(fields + 3 * pitch);
  box.area = get(fields + 4 * pitch);
  if constexpr (kKind >= Kind::kDistance) {
    box.cx = get(fields + 5 * pitch);
    box.cy = get(fields + 6 * pitch);
  }
  if constexpr (kKind == Kind::kComplete) box.angle = get(fields + 7 * pitch);
  return box;
}

template <Kind kKind, typename T>
PVK_INLINE Box<Vec<T>> load_box(const T* fields, int64_t pitch) {
  return get_box<kKind, T>(fields, pitch, [](const T* field) { return load(field); });
}

template <Kind kKind, typename T>
PVK_INLINE Box<Vec<T>> splat_box(const T* fields, int64_t pitch) {
  return get_box<kKind, T>(fields, pitch, [](const T* field) { return splat(*field); });
}

// ---- forward ----

// kRows rows of the output from `row`, of which it starts; columns [begin, end).
template <typename T, Kind kKind, int kRows>
PVK_INLINE void forward_rows(const T* fields1, int64_t pitch1, const T* fields2, int64_t pitch2, int64_t begin,
                             int64_t end, const Constants<Vec<T>>& constants, T* row, int64_t row_stride) {
  Box<Vec<T>> a[kRows];
  for (int r = 0; r < kRows; ++r) a[r] = splat_box<kKind, T>(fields1 + r, pitch1);
  const auto overlap = [&](int64_t j, const auto& write) {
    const Box<Vec<T>> b = load_box<kKind, T>(fields2 + j, pitch2);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
      write(row + r * row_stride + j, Pair<kKind, false, Vec<T>>(a[r], b, constants).value(constants));
  };
  const auto whole = [](T* target, Vec<T> value) { store(target, value); };
  int64_t j = begin;
  for (; j + kLanes<T> <= end; j += kLanes<T>) overlap(j, whole);
  if (j == end) return;
  if (end - begin >= kLanes<T>) return overlap(end - kLanes<T>, whole);  // some a second time
  overlap(j, [&](T* target, Vec<T> value) { std::memcpy(target, &value, size_t(end - j) * sizeof(T)); });
}

template <typename scalar_t, Kind kKind>
void forward_kind(const BoxIouParams& p) {
  using T = opmath_t<scalar_t>;
  const Constants<Vec<T>> constants = constants_of<T>(0, p.eps, p.eps);
  Fields<T> fields1(p.B, fields_of(kKind), p.N), fields2(p.B, fields_of(kKind), p.M);
  prepare<scalar_t, kKind, T>(p.boxes1, p.boxes1_stride, p.B, p.N, p.format, constants, fields1);
  prepare<scalar_t, kKind, T>(p.boxes2, p.boxes2_stride, p.B, p.M, p.format, constants, fields2);
  const int64_t row_blocks = ceil_div(p.N, kForwardRows), tiles = ceil_div(p.M, kTileColumns);
  const int64_t tile_pairs = min_of(p.N, kForwardRows) * min_of(p.M, kTileColumns);
  parallel_for(p.B * row_blocks * tiles, kPiecePairs / tile_pairs, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t batch = task / tiles / row_blocks, row_block = task / tiles % row_blocks;
      const int64_t begin = task % tiles * kTileColumns, end = min_of(begin + kTileColumns, p.M);
      const int64_t row_end = min_of((row_block + 1) * kForwardRows, p.N);
      const T* const two = fields2.of(batch);
      const auto rows = [&]<int kRows>(int64_t i) {
        forward_rows<T, kKind, kRows>(fields1.of(batch) + i, fields1.pitch, two, fields2.pitch, begin, end, constants,
                                      static_cast<T*>(p.output) + (batch * p.N + i) * p.M, p.M);
      };
      int64_t i = row_block * kForwardRows;
      for (; i + kRowsAtOnce <= row_end; i += kRowsAtOnce) rows.template operator()<kRowsAtOnce>(i);
      for (; i < row_end; ++i) rows.template operator()<1>(i);
    }
  });
}

// ---- backward ----

template <typename T>
PVK_INLINE T sum_of(Vec<T> value) {
  T lanes[kLanes<T>];
  store(lanes, value);
#pragma GCC unroll 8
  for (int half = kLanes<T> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

template <typename T>
struct LaneIndex {
  Vec<T> value;
  constexpr LaneIndex() : value{} {
    for (int i = 0; i < kLanes<T>; ++i) value[i] = T(i);
  }
};

// How the pairs are cut, and the sums that the tiles leave: of a column tile for every row, of a row chunk for every
// column.
template <typename T>
struct BackwardPlan {
  int64_t tiles, chunks, chunk_rows;
  Fields<T> sums1, sums2;  // [B * tiles][grad fields][N], [B * chunks][grad fields][M]

  static int64_t rows_of(const BoxIouParams& p) {
    const int64_t even = ceil_div(p.B * p.N * ceil_div(p.M, kTileColumns), kBackwardTiles);
    return min_of(kBackwardRows, max_of(int64_t(kLanes<T>), even));
  }
  BackwardPlan(const BoxIouParams& p, int64_t grad_fields)
      : tiles(ceil_div(p.M, kTileColumns)),
        chunks(ceil_div(p.N, rows_of(p))),
        chunk_rows(rows_of(p)),
        sums1(p.grad1 != nullptr ? p.B * tiles : 0, grad_fields, p.N),
        sums2(p.grad2 != nullptr ? p.B * chunks : 0, grad_fields, p.M) {}
};

// One row against columns [begin, end): the row's sums are written, the columns' grow.
template <typename T, Kind kKind, bool kNeed1, bool kNeed2>
PVK_INLINE void backward_row(const Box<Vec<T>>& a, const T* fields2, int64_t pitch2, int64_t begin, int64_t end,
                             const T* grad, const Constants<Vec<T>>& constants, T* row_sums, int64_t row_pitch,
                             T* column_sums) {
  BoxGrad<Vec<T>> row{}, recent{};
  const auto add_to = [](BoxGrad<Vec<T>>& sum, BoxGrad<Vec<T>>& value, const auto& keep) {
    Vec<T>* const sums[] = {&sum.x1, &sum.y1, &sum.x2, &sum.y2, &sum.area, &sum.angle};
    each_field<kKind>(value, [&](int field, Vec<T> part) { *sums[field] += keep(part); });
  };
  const auto all = [](Vec<T> value) { return value; };
  const auto add = [&](int64_t j, Vec<T> pair_grad, const auto& keep) {
    const Box<Vec<T>> b = load_box<kKind, T>(fields2 + j, pitch2);
    const Pair<kKind, false, Vec<T>> pair(a, b, constants);
    BoxGrad<Vec<T>> grad_a, grad_b;
    pair.gradient(a, b, constants, pair_grad, grad_a, grad_b);
    if constexpr (kNeed1) add_to(recent, grad_a, keep);
    if constexpr (kNeed2) {
      each_field<kKind>(grad_b, [&](int field, Vec<T> value) {
        T* const sum = column_sums + field * kTileColumns + (j - begin);
        store(sum, load(sum) + value);
      });
    }
  };
  int64_t j = begin;
  while (j + kLanes<T> <= end) {
    const int64_t stop = min_of(j + kCascade * kLanes<T>, end);
    for (; j + kLanes<T> <= stop; j += kLanes<T>) add(j, load(grad + (j - begin)), all);
    if constexpr (kNeed1) {
      add_to(row, recent, all);
      recent = BoxGrad<Vec<T>>{};
    }
  }
  if (j < end) {
    Vec<T> last{};
    std::memcpy(&last, grad + (j - begin), size_t(end - j) * sizeof(T));
    const LaneIndex<T> index;
    const Mask<T> inside = index.value < splat(T(end - j));
    add(j, last, [&](Vec<T> value) { return inside ? value : Vec<T>{}; });
  }
  if constexpr (kNeed1) {
    add_to(row, recent, all);
    each_field<kKind>(row, [&](int field, Vec<T> value) { row_sums[field * row_pitch] = sum_of<T>(value); });
  }
}

// What rows have left for the columns of a tile goes to `target`, and is zero again.
template <typename T, Kind kKind>
void flush(T* recent, T* target, int64_t pitch, int64_t columns, bool first) {
  for (int field = 0; field < grad_fields_of(kKind); ++field) {
    for (int64_t j = 0; j < columns; j += kLanes<T>) {
      T* const from = recent + field * kTileColumns + j;
      T* const to = target + field * pitch + j;
      store(to, first ? load(from) : load(to) + load(from));
      store(from, Vec<T>{});
    }
  }
}

template <typename T, Kind kKind, bool kNeed1, bool kNeed2>
void backward_tiles(const BoxIouParams& p, Fields<T>& fields1, Fields<T>& fields2, const Constants<Vec<T>>& constants,
                    BackwardPlan<T>& plan) {
  const int64_t tile_pairs = min_of(p.N, plan.chunk_rows) * min_of(p.M, kTileColumns);
  const int64_t together = kPiecePairs / 4 / max_of(tile_pairs, int64_t(1));
  parallel_for(p.B * plan.chunks * plan.tiles, together, [&](int64_t first, int64_t last) {
    T copy[kTileColumns];
    Buffer<T> recent(kNeed2 ? grad_fields_of(kKind) * kTileColumns : 0);
    for (int64_t i = 0; kNeed2 && i < grad_fields_of(kKind) * kTileColumns; ++i) recent[i] = T(0);
    for (int64_t task = first; task < last; ++task) {
      const int64_t tile = task % plan.tiles, batch = task / plan.tiles / plan.chunks;
      const int64_t chunk = task / plan.tiles % plan.chunks;
      const int64_t begin = tile * kTileColumns, end = min_of(begin + kTileColumns, p.M);
      const int64_t first_row = chunk * plan.chunk_rows, row_end = min_of(first_row + plan.chunk_rows, p.N);
      T* const row_sums = kNeed1 ? plan.sums1.of(batch * plan.tiles + tile) : nullptr;
      T* const column_sums = kNeed2 ? plan.sums2.of(batch * plan.chunks + chunk) + begin : nullptr;
      for (int64_t i = first_row; i < row_end; ++i) {
        const T* grad =
            static_cast<const T*>(p.grad) + batch * p.grad_stride[0] + i * p.grad_stride[1] + begin * p.grad_stride[2];
        if (p.grad_stride[2] != 1) {
          for (int64_t j = 0; j < end - begin; ++j) copy[j] = grad[j * p.grad_stride[2]];
          grad = copy;
        }
        const Box<Vec<T>> a = splat_box<kKind, T>(fields1.of(batch) + i, fields1.pitch);
        backward_row<T, kKind, kNeed1, kNeed2>(a, fields2.of(batch), fields2.pitch, begin, end, grad, constants,
                                               kNeed1 ? row_sums + i : nullptr, fields1.pitch, recent.data());
        if (kNeed2 && ((i + 1 - first_row) % kCascade == 0 || i + 1 == row_end))
          flush<T, kKind>(recent.data(), column_sums, fields2.pitch, end - begin, i - first_row < kCascade);
      }
    }
  });
}

// Adds the sums of `parts` pieces in order, and turns them into the gradient of the boxes as they were given.
template <typename scalar_t, Kind kKind, typename T>
void finish(const void* boxes, const int64_t (&stride)[3], int64_t batches, int64_t count, Format format,
            const Constants<Vec<T>>& constants, Fields<T>& sums, int64_t parts, void* target) {
  each_range(batches, count, [&](int64_t batch, int64_t begin, int64_t end) {
    const scalar_t* source = static_cast<const scalar_t*>(boxes) + batch * stride[0];
    for (int64_t i = begin; i < end; i += kLanes<T>) {
      CarefulSum<Vec<T>> total[kMaxGradFields];
      for (int64_t part = 0; part < parts; ++part) {
        const T* const from = sums.of(batch * parts + part) + i;
        for (int field = 0; field < grad_fields_of(kKind); ++field) total[field].add(load(from + field * sums.pitch));
      }
      BoxGrad<Vec<T>> grad{};
      each_field<kKind>(grad, [&](int field, Vec<T>& sum) { sum = total[field].total(); });
      Vec<T> c[4], out[4];
      load_boxes<scalar_t, T>(source + i * stride[1], stride[1], stride[2], end - i, c);
      finish_gradient<kKind>(format, c, grad, constants, out);
      store_boxes<scalar_t, T>(static_cast<scalar_t*>(target) + (batch * count + i) * 4, end - i, out);
    }
  });
}

template <typename scalar_t, Kind kKind>
void backward_kind(const BoxIouParams& p) {
  using T = opmath_t<scalar_t>;
  const Constants<Vec<T>> constants = constants_of<T>(0, p.eps, p.eps);
  Fields<T> fields1(p.B, fields_of(kKind), p.N), fields2(p.B, fields_of(kKind), p.M);
  prepare<scalar_t, kKind, T>(p.boxes1, p.boxes1_stride, p.B, p.N, p.format, constants, fields1);
  prepare<scalar_t, kKind, T>(p.boxes2, p.boxes2_stride, p.B, p.M, p.format, constants, fields2);
  BackwardPlan<T> plan(p, grad_fields_of(kKind));
  if (p.grad2 == nullptr) {
    backward_tiles<T, kKind, true, false>(p, fields1, fields2, constants, plan);
  } else if (p.grad1 == nullptr) {
    backward_tiles<T, kKind, false, true>(p, fields1, fields2, constants, plan);
  } else {
    backward_tiles<T, kKind, true, true>(p, fields1, fields2, constants, plan);
  }
  if (p.grad1 != nullptr)
    finish<scalar_t, kKind, T>(p.boxes1, p.boxes1_stride, p.B, p.N, p.format, constants, plan.sums1, plan.tiles,
                               p.grad1);
  if (p.grad2 != nullptr)
    finish<scalar_t, kKind, T>(p.boxes2, p.boxes2_stride, p.B, p.M, p.format, constants, plan.sums2, plan.chunks,
                               p.grad2);
}

}  // namespace

void forward(const BoxIouParams& p) {
  if (p.B == 0 || p.N == 0 || p.M == 0) return;
  dispatch_floating(p.dtype, [&](auto scalar) {
    dispatch_kind(p.kind, [&]<Kind kKind>() { forward_kind<decltype(scalar), kKind>(p); });
  });
}

void backward(const BoxIouParams& p) {
  dispatch_floating(p.dtype, [&](auto scalar) {
    dispatch_kind(p.kind, [&]<Kind kKind>() { backward_kind<decltype(scalar), kKind>(p); });
  });
}

}  // namespace PVK_ISA

PVK_CPU_ENTRY(void, forward, BoxIouParams)
PVK_CPU_ENTRY(void, backward, BoxIouParams)
#if defined(PVK_ISA_BASELINE)
int64_t scratch_bytes(const BoxIouParams&) {
  return 0;
}
#endif

}  // namespace pvk::box_iou
