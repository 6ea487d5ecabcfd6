// A second kind of device for the tests of code that runs on a GPU, of which there are two. Its tensors lie in
// memory of its own, which can be limited; each operation is done by the CPU's kernel on copies, and counted; and
// as on a GPU, an operation that is given tensors of two devices is an error.
//
// torch's guide to such devices: "Facilitating New Backend Integration by PrivateUse1" (pytorch.org/tutorials).

// Headers of single operations: those of all together take most of a minute to read
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/stack.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <mutex>
#include <string>
#include <unordered_map>

namespace {

constexpr auto KIND = c10::DeviceType::PrivateUse1;
constexpr c10::DeviceIndex COUNT = 2;
thread_local c10::DeviceIndex current = 0;

c10::Device here() { return {KIND, current}; }

// What is allocated while it lives is a device's.
struct At {
  explicit At(std::optional<c10::Device> device) : before(current) {
    if (device.has_value() && device->has_index()) current = device->index();
  }
  ~At() { current = before; }
  const c10::DeviceIndex before;
};

// ---------------------------------------------------------------------------------------------- memory

std::mutex guard_of_memory;
std::unordered_map<void*, int64_t> sizes;  // of what is allocated
int64_t held = 0, most = 0, limit = std::numeric_limits<int64_t>::max();
std::atomic<int64_t> operations{0};

void give_back(void* data) {
  if (data == nullptr) return;
  std::lock_guard<std::mutex> lock(guard_of_memory);
  auto found = sizes.find(data);
  held -= found->second;
  sizes.erase(found);
  std::free(data);
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &give_back, here()};
    std::lock_guard<std::mutex> lock(guard_of_memory);
    const auto size = static_cast<int64_t>(bytes);
    TORCH_CHECK_WITH(
        OutOfMemoryError, size <= limit - held, "second device out of memory: ", size, " bytes asked, ", held,
        " of ", limit, " are held");
    void* data = nullptr;
    TORCH_CHECK_WITH(OutOfMemoryError, posix_memalign(&data, 64, bytes) == 0, "host out of memory");
    sizes[data] = size;
    held += size;
    most = std::max(most, held);
    return {data, data, &give_back, here()};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Memory memory;

// ------------------------------------------------------------------- what torch asks of a kind of device

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return KIND; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const auto before = here();
    current = device.index();
    return before;
  }
  c10::Device getDevice() const override { return here(); }
  void setDevice(c10::Device device) const override { current = device.index(); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current = device.index(); }
  c10::Stream getStream(c10::Device device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, device.has_index() ? device : here());
  }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return COUNT; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static const at::Generator generator = at::detail::createCPUGenerator();
    return generator;
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::DeviceType::CPU); }
  bool isPinnedPtr(const void*) const override { return false; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto* inside = storage.unsafeGetStorageImpl();
    const At at(storage.device());
    c10::DataPtr larger = memory.allocate(bytes);
    if (const size_t kept = std::min(bytes, inside->nbytes())) std::memcpy(larger.get(), inside->data(), kept);
    inside->set_data_ptr_noswap(std::move(larger));
    inside->set_nbytes(bytes);
  }
};
Hooks hooks;

// ------------------------------------------------------------------------------ tensors and their views

c10::DispatchKeySet keys() { return c10::DispatchKeySet(c10::DispatchKey::PrivateUse1); }

at::Tensor make(
    c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<c10::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const At at(device);
  return at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(size), &memory, keys(), c10::dtype_or_default(dtype), format);
}

at::Tensor make_strided(
    c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>, std::optional<c10::Device> device, std::optional<bool>) {
  const At at(device);
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &memory, keys(),
      c10::dtype_or_default(dtype));
}

// The same bytes as a tensor of the CPU; a tensor of the CPU is left as it is.
at::Tensor seen_by_cpu(const at::Tensor& tensor) {
  if (!tensor.is_privateuseone()) return tensor;
  const auto bytes = static_cast<int64_t>(tensor.storage().nbytes());
  auto flat = at::from_blob(
      tensor.storage().mutable_data(), {bytes}, [tensor](void*) {}, at::TensorOptions().dtype(at::kByte));
  auto view = at::empty({0}, at::TensorOptions().dtype(tensor.dtype()));
  view.set_(flat.storage(), tensor.storage_offset(), tensor.sizes(), tensor.strides());
  if (tensor.is_conj()) view = view.conj();
  return view;
}

at::Tensor copy_between(const at::Tensor& from, const at::Tensor& to, bool) {
  seen_by_cpu(to).copy_(seen_by_cpu(from));
  return to;
}

at::Tensor copy_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_between(from, to, false);
}

at::Scalar one_number(const at::Tensor& tensor) {
  ++operations;  // a GPU is waited for
  return seen_by_cpu(tensor).item();
}

const at::Tensor& resize(const at::Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  self.unsafeGetTensorImpl()->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(size));
  const auto needed = static_cast<size_t>((self.storage_offset() + self.numel()) * self.itemsize());
  if (needed > self.storage().nbytes()) hooks.resizePrivateUse1Bytes(self.storage(), needed);
  return self;
}

at::Tensor& set_place(
    at::Tensor& self, at::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  auto* inside = self.unsafeGetTensorImpl();
  inside->set_storage_keep_dtype(std::move(storage));
  inside->set_storage_offset(offset.expect_int());
  inside->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
  return self;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage storage) {
  const auto count = static_cast<int64_t>(storage.nbytes() / self.itemsize());
  return set_place(self, std::move(storage), 0, c10::SymIntArrayRef({c10::SymInt(count)}), c10::SymIntArrayRef({c10::SymInt(1)}));
}

at::Tensor view(const at::Tensor& self, c10::SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

at::Tensor as_strided(
    const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::SymInt> offset) {
  const auto start = offset ? std::optional<int64_t>(offset->expect_int()) : std::nullopt;
  return at::native::as_strided_tensorimpl(
      self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), start);
}

at::Tensor reshape_alias(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

at::Tensor unfold(const at::Tensor& self, int64_t dimension, int64_t size, int64_t step) {
  return at::native::unfold(self, dimension, size, step);
}

// --------------------------------------------------------------------------------------- all the others

// Where CUDA takes tensors of the CPU beside its own: indices, and what copies between devices.
bool takes_both(const std::string& name) {
  return name == "aten::index" || name == "aten::index_put_" || name == "aten::_index_put_impl_" ||
      name == "aten::copy_" || name == "aten::_to_copy" || name == "aten::_copy_from";
}

void by_the_cpu(const c10::OperatorHandle& operation, c10::DispatchKeySet, torch::jit::Stack* stack) {
  ++operations;
  bool inside = false, outside = false, apart = false;
  c10::DeviceIndex first = 0;
  auto look = [&](const at::Tensor& tensor) {
    if (!tensor.defined()) return;
    if (tensor.is_privateuseone()) {
      apart |= inside && tensor.device().index() != first;
      first = tensor.device().index();
      inside = true;
    }
    outside |= tensor.is_cpu() && tensor.dim() > 0;  // CUDA takes single numbers from anywhere
  };
  for (const auto& value : torch::jit::last(*stack, operation.schema().arguments().size())) {
    if (value.isTensor()) look(value.toTensor());
    if (value.isTensorList())
      for (const at::Tensor& tensor : value.toTensorList()) look(tensor);
    if (value.isOptionalTensorList())
      for (const std::optional<at::Tensor> tensor : value.toOptionalTensorList())
        if (tensor.has_value()) look(*tensor);
  }
  TORCH_CHECK(
      !(apart || (inside && outside)) || takes_both(operation.schema().name()),
      "Expected all tensors to be on the same device, but found at least two devices, second:", int(first), " and ",
      apart ? "another of its kind" : "cpu", ", in ",
      operation.schema().name());
  at::native::cpu_fallback(operation, stack);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &make);
  m.impl("empty_strided", &make_strided);
  m.impl("_copy_from", &copy_between);
  m.impl("_copy_from_and_resize", &copy_and_resize);
  m.impl("_local_scalar_dense", &one_number);
  m.impl("resize_", &resize);
  m.impl("set_.source_Storage_storage_offset", &set_place);
  m.impl("set_.source_Storage", &set_storage);
  m.impl("view", &view);
  m.impl("as_strided", &as_strided);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("unfold", &unfold);
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&by_the_cpu>());
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("register_device", [] {
    c10::SetAllocator(KIND, &memory);
    at::RegisterPrivateUse1HooksInterface(&hooks);
  });
  m.def("held", [] { return held; });
  m.def("most", [] { return most; });
  m.def("forget_most", [] { most = held; });
  m.def("limit", [] { return limit; });
  m.def("set_limit", [](int64_t bytes) { limit = bytes; });
  m.def("operations", [] { return operations.load(); });
}
