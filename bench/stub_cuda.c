/* A CUDA driver without a device: what Triton's NVIDIA driver and its launchers ask of libcuda.so.1, and a launch that
 * does nothing but count. Memory is the host's own. It stands for one sm_90 with Hopper's shared memory. */

#include <stddef.h>
#include <stdint.h>

typedef int Result;
typedef struct {
  unsigned grid[3], block[3], shared_bytes;
  void *stream;
  void *attributes;
  unsigned attribute_count;
} LaunchConfig;

enum { SUCCESS = 0, NOT_SUPPORTED = 801 };

/* Of CUdevice_attribute and CUfunction_attribute. */
enum { MAX_REGISTERS = 12, CLOCK_RATE = 13, MULTIPROCESSORS = 16, MEMORY_CLOCK_RATE = 36, BUS_WIDTH = 37 };
enum { CAPABILITY_MAJOR = 75, CAPABILITY_MINOR = 76, SHARED_PER_MULTIPROCESSOR = 81, SHARED_PER_BLOCK = 97 };
enum { WARP_SIZE = 10, MAX_THREADS = 0, FUNCTION_REGISTERS = 4 };

static char context;
static uintptr_t functions;

/* Ours: launches so far. */
static uint64_t launches;

uint64_t stub_launches(void) { return launches; }

Result cuInit(unsigned flags) { return SUCCESS; }
Result cuDriverGetVersion(int *version) { *version = 13000; return SUCCESS; }
Result cuDeviceGetCount(int *count) { *count = 1; return SUCCESS; }
Result cuDeviceGet(int *device, int ordinal) { *device = ordinal; return SUCCESS; }
Result cuDevicePrimaryCtxRetain(void **made, int device) { *made = &context; return SUCCESS; }
Result cuCtxGetCurrent(void **current) { *current = &context; return SUCCESS; }
Result cuCtxSetCurrent(void *current) { return SUCCESS; }
Result cuCtxGetDevice(int *device) { *device = 0; return SUCCESS; }
Result cuCtxGetLimit(size_t *value, int limit) { *value = 1 << 20; return SUCCESS; }
Result cuCtxSetLimit(int limit, size_t value) { return SUCCESS; }
Result cuStreamIsCapturing(void *stream, int *status) { *status = 0; return SUCCESS; }
Result cuGetErrorString(Result error, const char **text) { *text = "error of the stub"; return SUCCESS; }

Result cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
  case CAPABILITY_MAJOR: *value = 9; break;
  case CAPABILITY_MINOR: *value = 0; break;
  case WARP_SIZE: *value = 32; break;
  case MAX_REGISTERS: *value = 65536; break;
  case MULTIPROCESSORS: *value = 132; break;
  case CLOCK_RATE: case MEMORY_CLOCK_RATE: *value = 1000000; break;
  case BUS_WIDTH: *value = 4096; break;
  case SHARED_PER_BLOCK: *value = 227 * 1024; break;
  case SHARED_PER_MULTIPROCESSOR: *value = 228 * 1024; break;
  default: *value = 0;
  }
  return SUCCESS;
}

Result cuModuleLoadData(void **module, const void *image) { *module = &context; return SUCCESS; }
Result cuModuleUnload(void *module) { return SUCCESS; }
/* Each function has a number of its own for a handle. */
Result cuModuleGetFunction(uintptr_t *function, void *module, const char *name) { *function = ++functions; return SUCCESS; }
Result cuFuncGetAttribute(int *value, int attribute, void *function) {
  *value = attribute == MAX_THREADS ? 1024 : attribute == FUNCTION_REGISTERS ? 128 : 0;
  return SUCCESS;
}
Result cuFuncSetAttribute(void *function, int attribute, int value) { return SUCCESS; }
Result cuFuncSetCacheConfig(void *function, int config) { return SUCCESS; }
Result cuPointerGetAttribute(void *value, int attribute, uintptr_t pointer) {
  *(uintptr_t *)value = pointer;
  return SUCCESS;
}

Result cuLaunchKernelEx(const LaunchConfig *config, uintptr_t function, void **parameters, void **extra) {
  launches++;
  return SUCCESS;
}

Result cuOccupancyMaxActiveClusters(int *clusters, void *function, const void *config) { *clusters = 1; return SUCCESS; }
Result cuTensorMapEncodeTiled(void) { return NOT_SUPPORTED; }
Result cuTensorMapEncodeIm2col(void) { return NOT_SUPPORTED; }
