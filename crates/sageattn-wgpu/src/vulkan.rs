//! What wgpu does not tell of a Vulkan device.

const LACKING: &str = "Vulkan's 8-bit matrices of 16x16x32 with 32-bit sums";

/// Whether a device multiplies the matrices of [`attend::matrix_i8`](crate::attend::matrix_i8): signed
/// bytes of 16 x 32 by 32 x 16 with 32-bit sums, and f16 of 16 x 16 with f32 sums, in one subgroup.
///
/// wgpu lists float matrices only. A driver given matrices that it has not listed may do anything, so
/// the list itself is asked.
#[cfg(any(windows, target_os = "linux", target_os = "android"))]
pub(crate) fn i8_matrices(device: &wgpu::Device) -> Result<(), String> {
    match has_i8_matrices(device) {
        true => Ok(()),
        false => Err(LACKING.to_owned()),
    }
}

#[cfg(any(windows, target_os = "linux", target_os = "android"))]
fn has_i8_matrices(device: &wgpu::Device) -> bool {
    use ash::vk;

    // Without the feature the extension need not be there to be asked.
    if !device
        .features()
        .contains(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX)
    {
        return false;
    }
    // SAFETY: Nothing is destroyed, and nothing but a property of the physical device is read.
    let Some(hal) = (unsafe { device.as_hal::<wgpu::hal::api::Vulkan>() }) else {
        return false;
    };
    let instance = hal.shared_instance();
    let matrices =
        ash::khr::cooperative_matrix::Instance::new(instance.entry(), instance.raw_instance());
    // SAFETY: wgpu grants the feature only where it has asked the same of this physical device, which
    // the guard keeps alive.
    let listed = unsafe {
        matrices.get_physical_device_cooperative_matrix_properties(hal.raw_physical_device())
    };
    let Ok(listed) = listed else {
        return false;
    };
    let has = |k, factor, sum| {
        listed.iter().any(|m| {
            (m.m_size, m.n_size, m.k_size) == (16, 16, k)
                && (m.a_type, m.b_type) == (factor, factor)
                && (m.c_type, m.result_type) == (sum, sum)
                && m.scope == vk::ScopeKHR::SUBGROUP
        })
    };
    has(
        32,
        vk::ComponentTypeKHR::SINT8,
        vk::ComponentTypeKHR::SINT32,
    ) && has(
        16,
        vk::ComponentTypeKHR::FLOAT16,
        vk::ComponentTypeKHR::FLOAT32,
    )
}

/// No Vulkan through wgpu here.
#[cfg(not(any(windows, target_os = "linux", target_os = "android")))]
pub(crate) fn i8_matrices(_device: &wgpu::Device) -> Result<(), String> {
    Err(LACKING.to_owned())
}
