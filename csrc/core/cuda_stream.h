// Where CUDA work goes. No CUDA header: also for plain C++ files.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

namespace llmfast {

// A stream of a device; handle nullptr is the device's default stream.
struct Stream {
  int device;
  void* handle;
};

struct CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct DeviceInfo {
  std::string name;
  int major, minor;  // compute capability
  int multiprocessors;
  int shared_per_block;           // bytes of dynamic shared memory that one block may ask for
  int shared_per_multiprocessor;  // bytes
};

int device_count();                          // 0 without a driver
const DeviceInfo& device_info(int device);   // read once per device; throws CudaError
std::string why_no_device();                 // "" if there is one

// Makes a device the calling thread's current one until the end of the scope.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;

 private:
  int before_, device_;
};

}  // namespace llmfast
