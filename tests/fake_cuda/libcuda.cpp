// Stands for the CUDA driver where there is none, so that a CUDA build of torch loads and its
// operators run on fake tensors: every call answers "no device" (CUDA_ERROR_NO_DEVICE, 100).
// Preloaded, it also answers c10's question for the number of devices, which is asked of the driver
// otherwise; device.py sets the number.
//
//   g++ -shared -fPIC -Wl,-soname,libcuda.so.1 -o libcuda.so.1 libcuda.cpp

static signed char devices = 0;

extern "C" void set_device_count(int count) { devices = static_cast<signed char>(count); }

namespace c10 {
namespace cuda {
signed char device_count() noexcept { return devices; }
}  // namespace cuda
}  // namespace c10

#define NO_DEVICE(name) \
  int name() { return 100; }

extern "C" {
NO_DEVICE(cuCtxGetCurrent)
NO_DEVICE(cuCtxSetCurrent)
NO_DEVICE(cuDeviceGet)
NO_DEVICE(cuDeviceGetAttribute)
NO_DEVICE(cuDevicePrimaryCtxRetain)
NO_DEVICE(cuFuncGetAttribute)
NO_DEVICE(cuFuncSetAttribute)
NO_DEVICE(cuFuncSetCacheConfig)
NO_DEVICE(cuGetErrorString)
NO_DEVICE(cuLaunchCooperativeKernel)
NO_DEVICE(cuLaunchKernel)
NO_DEVICE(cuLinkAddData_v2)
NO_DEVICE(cuLinkComplete)
NO_DEVICE(cuLinkCreate_v2)
NO_DEVICE(cuModuleGetFunction)
NO_DEVICE(cuModuleLoad)
NO_DEVICE(cuModuleLoadData)
NO_DEVICE(cuModuleLoadDataEx)
NO_DEVICE(cuModuleUnload)
NO_DEVICE(cuOccupancyMaxActiveBlocksPerMultiprocessor)
NO_DEVICE(cuPointerGetAttribute)
NO_DEVICE(cuTensorMapEncodeTiled)

int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
  *flags = 0;
  *active = 0;
  return 0;
}
}
