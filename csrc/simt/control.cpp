// What Python sets of the emulator, by ctypes: in libpvk_simt.so and in the library of the emulator's own tests.
#include "simt/host.h"

#define SIMT_EXPORT extern "C" __attribute__((visibility("default")))

// Of all launches from now on; see simt::Options.
SIMT_EXPORT void pvk_simt_set_options(uint64_t seed, int races, int global_races) {
  simt::set_options({seed, races != 0, global_races != 0});
}
