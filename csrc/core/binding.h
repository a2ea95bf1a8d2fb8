// What a binding needs of torch: tensors, checks, allocation, registration. Bindings include this, kernels never do.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <sstream>
#include <stdexcept>
#include <string>

#include "core/memory.h"
#include "core/types.h"

#if defined(PVK_SIMT)
#include "simt/host.h"
#endif

#if !defined(STABLE_TORCH_ERROR_CODE_CHECK)  // torch 2.11
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

// The build compiles each binding once into each library: PVK_NAMESPACE::op for the dispatch key PVK_DISPATCH_KEY.
#define PVK_LIBRARY_IMPL_(ns, key, m) STABLE_TORCH_LIBRARY_IMPL(ns, key, m)
#define PVK_LIBRARY_IMPL(m) PVK_LIBRARY_IMPL_(PVK_NAMESPACE, PVK_DISPATCH_KEY, m)

// "<op>: expected <argument> to <property>, but got <value>"
#define PVK_CHECK(condition, ...) \
  if (!(condition)) ::pvk::fail(__VA_ARGS__)

namespace pvk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
[[noreturn, gnu::cold]] void fail(const Parts&... parts) {
  std::ostringstream message;
  ((message << parts), ...);
  throw std::runtime_error(message.str());
}

template <typename TensorOrView>
std::string shape_of(const TensorOrView& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << ']';
  return text.str();
}

template <typename TensorOrView>
DType dtype_of(const char* op, const char* argument, const TensorOrView& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      fail(op, ": expected ", argument, " to be float16, bfloat16, float32 or float64, but got ", tensor.scalar_type());
  }
}

template <typename TensorOrView, typename OtherTensorOrView>
void check_same_device(const char* op, const char* argument, const TensorOrView& tensor, const char* other_argument,
                       const OtherTensorOrView& other) {
  const auto device = tensor.device();
  PVK_CHECK(device == other.device(), op, ": expected ", argument, " to be on the device of ", other_argument,
            ", but got ",
            device.is_cuda()  ? "cuda:"
            : device.is_cpu() ? "cpu:"
                              : "another device:",
            device.index());
}

// Uninitialised, on the device of `like`.
inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype, const Tensor& like,
                    bool channels_last = false) {
  const Tensor tensor = torch::stable::empty(
      {sizes.begin(), sizes.size()}, dtype, std::nullopt, like.device(), std::nullopt,
      channels_last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous);
#if !defined(PVK_CUDA)
  advise_huge_pages(tensor.data_ptr(), tensor.numel() * int64_t(tensor.element_size()));
#endif
  return tensor;
}

// The address for a kernel, inside a DeviceScope. The emulator is told which memory the view's elements lie in: a
// kernel that touches any other is stopped.
inline void* data_of(const Tensor& tensor) {
  void* const data = tensor.data_ptr();
#if defined(PVK_SIMT)
  if (tensor.numel() == 0) return data;
  int64_t last = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  simt::allow_global(data, size_t(last + 1) * tensor.element_size());
#endif
  return data;
}

// A tensor of at most four dimensions as checks and kernels see it, or memory that is no tensor's. Made inside a
// DeviceScope.
class View {
 public:
  View() = default;
  View(const Tensor& tensor)
      : data_(data_of(tensor)), dtype_(tensor.scalar_type()), device_(tensor.device()), dim_(tensor.dim()) {
    PVK_CHECK(dim_ <= 4, "View: expected at most 4 dimensions, but got ", shape_of(tensor));
    for (int64_t i = 0; i < dim_; ++i) {
      sizes_[i] = tensor.size(i);
      strides_[i] = tensor.stride(i);
    }
  }
  // Dense memory with the dtype and the device of another; 4 dimensions are channels_last, or contiguous.
  View(void* data, std::initializer_list<int64_t> sizes, const View& like, bool channels_last)
      : data_(data), dtype_(like.dtype_), device_(like.device_), dim_(int64_t(sizes.size())) {
    int64_t i = 0, stride = 1;
    for (const int64_t size : sizes) sizes_[i++] = size;
    if (channels_last && dim_ == 4) {
      strides_[1] = 1;
      strides_[3] = sizes_[1];
      strides_[2] = sizes_[3] * strides_[3];
      strides_[0] = sizes_[2] * strides_[2];
      return;
    }
    for (i = dim_; i-- > 0; stride *= sizes_[i]) strides_[i] = stride;
  }

  void* data() const { return data_; }
  ScalarType scalar_type() const { return dtype_; }
  torch::stable::Device device() const { return device_; }
  int64_t dim() const { return dim_; }
  int64_t size(int64_t i) const { return sizes_[i]; }
  int64_t stride(int64_t i) const { return strides_[i]; }
  int64_t numel() const {
    int64_t count = 1;
    for (int64_t i = 0; i < dim_; ++i)
      PVK_CHECK(!__builtin_mul_overflow(count, sizes_[i], &count), "expected fewer elements, but got ",
                shape_of(*this));
    return count;
  }

 private:
  void* data_ = nullptr;
  ScalarType dtype_ = ScalarType::Float;
  torch::stable::Device device_{torch::headeronly::DeviceType::CPU};
  int64_t dim_ = 0, sizes_[4] = {}, strides_[4] = {};
};

// Makes the tensor's device current, and names the stream that the kernels are queued on.
class DeviceScope {
 public:
#if defined(PVK_CUDA)
  explicit DeviceScope(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  }
#else
  explicit DeviceScope(const Tensor&) {}
#endif
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;
  Stream stream() const { return stream_; }

 private:
#if defined(PVK_CUDA)
  torch::stable::accelerator::DeviceGuard guard_;
#elif defined(PVK_SIMT)
  simt::GlobalScope global_scope_;
#endif
  void* stream_ = nullptr;
};

}  // namespace pvk
